"""A hash of integers that is the same on every machine: the order of windows, and samples, depend on it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# SplitMix64's constants. Never to be changed: every stored plan's order of windows follows from them.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((30, np.uint64(0xBF58476D1CE4E5B9)), (27, np.uint64(0x94D049BB133111EB)))


def keyed_hash(ordinals: NDArray[np.integer], key: int) -> NDArray[np.uint64]:
    """[n] 64-bit hashes of `ordinals` under a 128-bit `key`; different ordinals have different hashes."""
    low, high = (np.uint64((key >> shift) & 0xFFFFFFFFFFFFFFFF) for shift in (0, 64))
    mixed = np.asarray(ordinals).astype(np.uint64)
    # Two rounds of SplitMix64's finaliser (Steele, Lea and Flood 2014), half of the key before each. Every
    # step is a bijection of 64-bit words, so an order by hash has no ties. Overflow wraps, as it must.
    with np.errstate(over="ignore"):
        mixed = _finalise(mixed * _GOLDEN + low)
        return _finalise(mixed * _GOLDEN + high)


def _finalise(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    for shift, factor in _MIX:
        words = (words ^ (words >> np.uint64(shift))) * factor
    return words ^ (words >> np.uint64(31))
