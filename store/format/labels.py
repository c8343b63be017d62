"""Labels: what each token of a window is. Kept beside the tokens, in planned order, one chunk a unit.

======== ====== ==================================================================================
role     uint8  number of the role, whose name is in `plan.labels.roles`; 0, `none`, for plain text
turn     uint16 number of the message in its conversation, from 0; 0 for plain text
flags    uint8  bits `SPECIAL`, `FIRST` and `LAST_TURN` of `winnow.schemas.labels`
source   uint16 number of the source in `corpus.sources`
document uint64 number of the document in the corpus, from 0
offset   uint32 place of the token in its document, from 0
======== ====== ==================================================================================

A BOS that the plan puts before a window is special, of no role, and otherwise labelled as the token after it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from winnow.schemas.harvest import HarvestPlan
from winnow.store.format.layout import LABELS_GROUP

LABELS: dict[str, np.dtype[np.generic]] = {
    "role": np.dtype("u1"),
    "turn": np.dtype("<u2"),
    "flags": np.dtype("u1"),
    "source": np.dtype("<u2"),
    "document": np.dtype("<u8"),
    "offset": np.dtype("<u4"),
}
"""Label -> little-endian dtype on disk. The order is that of the digests."""
LABEL_BYTES = sum(dtype.itemsize for dtype in LABELS.values())
"""Bytes of a token's labels."""

Labels = Mapping[str, NDArray[np.generic]]
"""Label -> [W, T], in the dtype on disk."""


def label_key(name: str, unit: int) -> str:
    """Key of one unit's chunk of a label."""
    return f"{LABELS_GROUP}/{name}/c/{unit}/0"


def label_keys(plan: HarvestPlan, unit: int) -> dict[str, str]:
    """Label -> key of one unit's chunk; empty if the plan has no labels."""
    return {name: label_key(name, unit) for name in LABELS} if plan.labels is not None else {}


def label_digests(labels: Labels) -> NDArray[np.uint8]:
    """uint8 [labels, 32]: the SHA-256 of each label of a unit."""
    made = [hashlib.sha256(np.ascontiguousarray(labels[name], LABELS[name]).data).digest() for name in LABELS]
    return np.frombuffer(b"".join(made), np.uint8).reshape(len(LABELS), 32)


def document_positions(documents: NDArray[Any]) -> NDArray[np.int64]:
    """Each token's place in its document, counted from the document's first token in the window.

    A document that began in an earlier window begins again at 0: its earlier tokens are not seen.

    Args:
        documents: The label `document` [W, T].

    Returns:
        int64 [W, T].
    """
    at = np.broadcast_to(np.arange(documents.shape[1], dtype=np.int64), documents.shape)
    begins = np.ones(documents.shape, bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return at - np.maximum.accumulate(np.where(begins, at, 0), axis=1)
