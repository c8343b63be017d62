"""crc32c: the same of every buffer, by the package's way and by the one without the interpreter's lock."""

from __future__ import annotations

import google_crc32c
import numpy as np
import pytest

from winnow.store.format import checksum
from winnow.store.format.checksum import crc32c


@pytest.mark.parametrize("size", [1, 9, 2**15 - 1, 2**15, 2**15 + 3, 600_001])
@pytest.mark.parametrize("unlocked", [True, False])
def test_of_every_buffer(monkeypatch: pytest.MonkeyPatch, size: int, unlocked: bool) -> None:
    if not unlocked:
        monkeypatch.setattr(checksum, "_value", None)
    data = np.random.default_rng(size).integers(0, 256, size + 1, np.uint8)[1:]  # not aligned
    expected = google_crc32c.value(data.tobytes())  # pyright: ignore[reportUnknownMemberType]
    for buffer in (data, data.tobytes(), bytearray(data), memoryview(data)):
        assert crc32c(buffer) == expected
    data[size // 2] ^= 1
    assert crc32c(data) != expected


def test_the_standard_check_value() -> None:
    assert crc32c(b"123456789") == 0xE3069283
