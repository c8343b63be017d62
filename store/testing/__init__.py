"""For tests of Winnow and of storage backends: synthetic datasets, a faulty store, a conformance suite."""

from winnow.store.testing.conformance import StoreConformance
from winnow.store.testing.faulty import Crash, FaultyStore, flip_bit
from winnow.store.testing.synthetic import (
    make_attempt,
    make_plan,
    planned_rows,
    stored_rows,
    synthetic_digests,
    synthetic_labels,
    synthetic_rows,
    synthetic_tokens,
    write_dataset,
    write_plan,
    write_unit,
)

__all__ = [
    "Crash",
    "FaultyStore",
    "StoreConformance",
    "flip_bit",
    "make_attempt",
    "make_plan",
    "planned_rows",
    "stored_rows",
    "synthetic_digests",
    "synthetic_labels",
    "synthetic_rows",
    "synthetic_tokens",
    "write_dataset",
    "write_plan",
    "write_unit",
]
