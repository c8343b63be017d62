"""crc32c (Castagnoli), with the interpreter's lock released while it runs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, cast

import google_crc32c
import numpy as np
from numpy.typing import NDArray

# Releasing the lock costs about 2 us, which fewer bytes are not worth.
_SHORT = 2**15
"""Bytes from which the lock is released."""
_locked = cast(Callable[..., int], google_crc32c.value)  # pyright: ignore[reportUnknownMemberType]


def _unlocked() -> Callable[[int, int], int]:
    """Find the C function of an address and a length; OSError or AttributeError if there is none."""
    # google-crc32c holds the lock: of several threads only one checks at a time, and the others cannot even
    # begin their next read. ctypes calls the C library under its extension module without the lock.
    module: Any = getattr(google_crc32c, "_crc32c", None)
    function = ctypes.CDLL(getattr(module, "__file__", "")).crc32c_value
    function.restype, function.argtypes = ctypes.c_uint32, (ctypes.c_void_p, ctypes.c_size_t)
    return function


try:
    _value: Callable[[int, int], int] | None = _unlocked()
except (OSError, AttributeError):  # another build of google-crc32c: slower with threads, but correct
    _value = None


def crc32c(data: bytes | bytearray | memoryview | NDArray[np.uint8]) -> int:
    """Compute the crc32c of contiguous bytes, without a copy."""
    view = np.frombuffer(data, np.uint8)  # the package refuses other writable buffers
    if _value is None or view.size < _SHORT:
        return _locked(view)
    return _value(view.__array_interface__["data"][0], view.size)
