"""Reading labels, every byte checked. What they mean: `winnow.store.format.labels`.

Letters: T context length, W windows in a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from winnow.schemas.base import sha256_hex
from winnow.schemas.errors import ConfigError, IntegrityError, MissingObject
from winnow.schemas.harvest import HarvestPlan
from winnow.schemas.labels import PlannedLabels
from winnow.store.format.labels import LABELS, document_positions, label_key
from winnow.store.format.shards import decode_chunk
from winnow.store.format.zarr_metadata import LABEL_DIGESTS_KEY
from winnow.store.objects import ObjectStore

# As for tokens: a plan from elsewhere may claim any size.
MAX_LABEL_CHUNK_BYTES = 1 << 31
"""Largest chunk of labels or label digests that is read, in bytes."""


def planned_labels(store: ObjectStore, plan: HarvestPlan) -> PlannedLabels:
    """The plan's labels; ConfigError if it was made before labels existed."""
    if plan.labels is None:
        raise ConfigError(
            f"{store.uri} has no labels",
            expected="a plan with labels (role, turn, source, ...)",
            got="one of an earlier version",
            fix="Plan and harvest at a new root",
        )
    return plan.labels


def load_label_digests(store: ObjectStore, plan: HarvestPlan) -> NDArray[np.uint8]:
    """uint8 [units, labels, 32]: SHA-256 of every unit's label chunks, checked against the plan.

    Raises:
        ConfigError: The plan has no labels.
        MissingObject: They do not exist: planning has not finished.
        IntegrityError: They differ from the plan's digest.
    """
    promised = planned_labels(store, plan).sha256
    try:
        data = store.get(LABEL_DIGESTS_KEY, limit=MAX_LABEL_CHUNK_BYTES)
    except MissingObject as error:
        raise MissingObject(
            f"{store.uri} lacks its label digests", expected=LABEL_DIGESTS_KEY, fix="Run `winnow plan` again"
        ) from error
    digests = decode_chunk(data, "u1", (plan.units, len(LABELS), 32), what="label digests")
    found = sha256_hex(digests.tobytes())
    if found != promised:
        raise IntegrityError("label digests", expected=f"sha256 {promised}", got=found)
    return digests


def read_labels(
    store: ObjectStore,
    plan: HarvestPlan,
    unit: int,
    names: Iterable[str] = LABELS,
    digests: NDArray[np.uint8] | None = None,
) -> dict[str, NDArray[np.generic]]:
    """Read labels of a unit's tokens, checked against the plan.

    Args:
        store: The dataset's root.
        plan: Its plan.
        unit: The unit's number.
        names: The labels to read; all of them by default.
        digests: Result of `load_label_digests`, to load it once for many units.

    Returns:
        Label -> [W, T], in the planned order of the tokens, read-only.

    Raises:
        ConfigError: The plan has no labels, or not this one.
        MissingObject: A chunk does not exist.
        IntegrityError: The labels differ from those that were planned.
    """
    if digests is None:
        digests = load_label_digests(store, plan)
    return {name: _read_label(store, plan, unit, name, digests) for name in names}


def read_positions(
    store: ObjectStore, plan: HarvestPlan, unit: int, digests: NDArray[np.uint8] | None = None
) -> NDArray[np.int64] | None:
    """Read where each token of a unit's windows is in its document, if attention stays inside documents.

    Returns:
        int64 [W, T], see `store.format.labels.document_positions`; None if tokens see their whole window.

    Raises:
        MissingObject, IntegrityError: As for `read_labels`.
    """
    if plan.spec.attend == "window":
        return None
    return document_positions(read_labels(store, plan, unit, ["document"], digests)["document"])


def window_positions(
    plan: HarvestPlan,
    windows: Sequence[int],
    labels: Callable[[int], Mapping[str, NDArray[np.generic]]],
) -> NDArray[np.int64] | None:
    """`read_positions` of some windows of a dataset, int64 [len(windows), T].

    Args:
        plan: The dataset's plan.
        windows: Numbers of windows of the dataset.
        labels: Unit -> at least the label `document` [W, T].
    """
    if plan.spec.attend == "window":
        return None
    size, asked = plan.spec.windows_per_unit, np.asarray(windows, dtype=np.int64)
    out = np.empty((asked.size, plan.spec.context_length), np.int64)
    for unit in np.unique(asked // size):
        chosen = asked // size == unit
        out[chosen] = document_positions(labels(int(unit))["document"][asked[chosen] % size])
    return out


def _read_label(
    store: ObjectStore, plan: HarvestPlan, unit: int, name: str, digests: NDArray[np.uint8]
) -> NDArray[np.generic]:
    if name not in LABELS:
        raise ConfigError("label", expected=f"one of {', '.join(LABELS)}", got=repr(name))
    key, what = label_key(name, unit), f"label {name!r} of unit {unit}"
    try:
        data = store.get(key, limit=MAX_LABEL_CHUNK_BYTES)
    except MissingObject as error:
        raise MissingObject(f"{what} is missing", expected=key, fix="Run `winnow plan` again") from error
    shape = (plan.spec.windows_per_unit, plan.spec.context_length)
    values = decode_chunk(data, LABELS[name].str, shape, what=what)
    # The crc32c does not tell two sound chunks apart that changed places; the digest does.
    expected, found = digests[unit, list(LABELS).index(name)].tobytes().hex(), sha256_hex(values.tobytes())
    if found != expected:
        raise IntegrityError(what, expected=f"sha256 {expected}", got=found)
    return values
