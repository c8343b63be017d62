"""What is remembered of the documents read: counts, one digest, and which texts have been seen."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

BAD_NAMED = 5
"""Records left out that are named, the first."""


class DigestSet:
    """A set of 16-byte digests in about 32 bytes each (a Python set of bytes takes over 100).

    256 open-addressed tables, so that growing one never doubles the whole.
    """

    def __init__(self) -> None:
        self._tables = [bytearray(16 * 16) for _ in range(256)]
        self._counts = [0] * 256

    def add(self, digest: bytes) -> bool:
        """Insert `digest`; True where it was new."""
        which = digest[0]
        table = self._tables[which]
        if not self._insert(table, digest):
            return False
        self._counts[which] += 1
        if self._counts[which] * 64 > len(table) * 3:  # fuller than three quarters
            grown = bytearray(2 * len(table))
            for at in range(0, len(table), 16):
                if (entry := bytes(table[at : at + 16])) != bytes(16):
                    self._insert(grown, entry)
            self._tables[which] = grown
        return True

    @property
    def bytes(self) -> int:
        """Memory of the tables."""
        return sum(len(table) for table in self._tables)

    @staticmethod
    def _insert(table: bytearray, digest: bytes) -> bool:
        slots = len(table) // 16
        slot = int.from_bytes(digest[1:9], "little") % slots
        while (entry := table[16 * slot : 16 * slot + 16]) != bytes(16):
            if entry == digest:
                return False
            slot = (slot + 1) % slots
        table[16 * slot : 16 * slot + 16] = digest
        return True


@dataclass
class Tally:
    """What has been read so far; filled in by `documents` as it goes."""

    documents: int = 0
    characters: int = 0
    duplicates: int = 0
    bytes_done: int = 0
    """Stored (compressed) bytes read."""
    bad: dict[str, int] = field(default_factory=dict[str, int])
    """Records left out, by reason."""
    bad_first: list[str] = field(default_factory=list[str])
    """The first of them, `file, place: reason`."""
    _sha256: Any = field(default_factory=hashlib.sha256)

    def count(self, text: bytes, characters: int) -> None:
        """Take one document, as UTF-8, into the counts and the digest."""
        self.documents += 1
        self.characters += characters
        self._sha256.update(len(text).to_bytes(8, "little"))
        self._sha256.update(text)

    def leave_out(self, where: str, reason: str) -> None:
        """Count one record that was left out."""
        self.bad[reason] = self.bad.get(reason, 0) + 1
        if len(self.bad_first) < BAD_NAMED:
            self.bad_first.append(f"{where}: {reason}")

    def sha256(self) -> str:
        """Digest over every document's UTF-8 text, each after its length (8 bytes, little-endian)."""
        return self._sha256.hexdigest()
