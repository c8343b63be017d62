"""What the planner knows of a token beside its id, and labels from it. Pure: no I/O.

Document and offset of a token follow from where its window begins and where documents begin in it, and the
source follows from the document: the spill file needs one byte per token for all labels, or three if the
corpus has conversations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from winnow.schemas.labels import FIRST
from winnow.store.format.labels import LABELS, Labels

_FLAG_BITS = 3
FIRST_MARK = FIRST
"""Bit of a mark that says that a document begins here."""


def stream_dtype(token: np.dtype[Any], turns: bool) -> np.dtype[Any]:
    """Return the dtype of one token of a document: its id, its mark, and its turn if the corpus has any."""
    fields = [("token", token), ("mark", "u1"), *([("turn", "<u2")] if turns else [])]
    return np.dtype(fields)


def window_dtype(context_length: int, token: np.dtype[Any], turns: bool) -> np.dtype[Any]:
    """Return the dtype of a window: where it begins, and the fields of `stream_dtype`, [T] each.

    `run` counts the documents of the stream before the one in which the window begins; `offset` is the place
    in it.
    """
    fields = stream_dtype(token, turns).fields or {}
    each = [(name, kind[0], (context_length,)) for name, kind in fields.items()]
    return np.dtype([("run", "<u8"), ("offset", "<u4"), *each])


def mark(role: int | NDArray[Any], flags: int | NDArray[Any]) -> NDArray[np.uint8]:
    """Role and flags in one byte."""
    return (np.left_shift(role, _FLAG_BITS) | flags).astype(np.uint8)


def document_tokens(
    ids: Sequence[int] | NDArray[Any],
    dtype: np.dtype[Any],
    *,
    flags: int | NDArray[Any] = 0,
    roles: int | NDArray[Any] = 0,
    turns: int | NDArray[Any] | None = None,
) -> NDArray[Any]:
    """One document [n] of `stream_dtype`, with the first token marked; `turns` None is a corpus without."""
    made = np.empty(len(ids), stream_dtype(dtype, turns is not None))
    made["token"], made["mark"] = ids, mark(roles, flags)
    if turns is not None:
        made["turn"] = turns
    made["mark"][:1] |= FIRST_MARK
    return made


def labels_of(
    windows: NDArray[Any],
    lead: int,
    documents: NDArray[np.uint64],
    source_starts: NDArray[np.uint64],
) -> Labels:
    """The labels [n, T] of windows.

    Args:
        windows: [n] of `window_dtype`.
        lead: Tokens before the stream's in each window: 1 with a BOS, otherwise 0. A window that begins with
            the first token of a document has none.
        documents: The number of each document of the stream.
        source_starts: The first document of each source, or of the next one if a source has none.
    """
    marks = np.ascontiguousarray(windows["mark"])
    count, length = marks.shape
    # What begins where the window's own text does is counted in `run` already.
    begins = (marks & FIRST_MARK).astype(bool)
    leads = np.where(begins[:, 0], 0, lead)
    begins[:, 0] = False
    begins[leads > 0, 1:2] = False
    # Pieces of one document in one window, from the first token of either: what is the same for all tokens of
    # a piece is computed once for each.
    begins[:, 0] = True
    at = np.flatnonzero(begins)
    sizes = np.diff(at, append=marks.size)
    row, place = np.divmod(at, length)
    before = np.arange(len(at)) - np.flatnonzero(place == 0)[row]
    document = documents[windows["run"][row] + before.astype(np.uint64)]
    source = np.searchsorted(source_starts, document, side="right") - 1
    # Where each piece's document would begin, were it all in a row.
    origin = np.where(place == 0, at - windows["offset"][row].astype(np.int64) + leads[row], at)
    offset = (np.arange(marks.size) - np.repeat(origin, sizes)).reshape(count, length)
    offset[leads > 0, 0] = windows["offset"][leads > 0]
    found = {
        "role": marks >> _FLAG_BITS,
        "turn": windows["turn"] if "turn" in (windows.dtype.names or ()) else np.zeros_like(marks),
        "flags": marks & ((1 << _FLAG_BITS) - 1),
        "source": np.repeat(source.astype(LABELS["source"]), sizes).reshape(count, length),
        "document": np.repeat(document, sizes).reshape(count, length),
        "offset": offset,
    }
    return {name: np.ascontiguousarray(found[name], dtype) for name, dtype in LABELS.items()}
