"""crc32c (Castagnoli), with the interpreter's lock released while it runs.

google-crc32c holds that lock, so that of several threads only one checks at a time and the others cannot
even begin their next read. The C library under it, found through its extension module, is called without.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, cast

import google_crc32c
import numpy as np
from numpy.typing import NDArray

_SHORT = 2**15
"""Bytes from which giving up the lock is worth its price, about 2 us."""
_locked = cast(Callable[..., int], google_crc32c.value)  # pyright: ignore[reportUnknownMemberType]


def _unlocked() -> Callable[[int, int], int]:
    """The C function of an address and a length; OSError or AttributeError where it is not had."""
    module: Any = getattr(google_crc32c, "_crc32c", None)
    function = ctypes.CDLL(getattr(module, "__file__", "")).crc32c_value
    function.restype, function.argtypes = ctypes.c_uint32, (ctypes.c_void_p, ctypes.c_size_t)
    return function


try:
    _value: Callable[[int, int], int] | None = _unlocked()
except (OSError, AttributeError):  # another build of google-crc32c: right all the same
    _value = None


def crc32c(data: bytes | bytearray | memoryview | NDArray[np.uint8]) -> int:
    """crc32c of contiguous bytes, without a copy."""
    view = np.frombuffer(data, np.uint8)  # the package refuses writable buffers, and takes any view
    if _value is None or view.size < _SHORT:
        return _locked(view)
    return _value(view.__array_interface__["data"][0], view.size)
