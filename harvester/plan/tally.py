"""State kept of the documents read: counts, one digest, and which texts have been seen."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

# The plan stores them, and it must not grow with a corpus of bad records.
_BAD_NAMED = 5
"""How many of the records left out are named: the first ones."""


class DigestSet:
    """A set of 16-byte digests in about 32 bytes each (a Python set of bytes takes over 100)."""

    def __init__(self) -> None:
        # 256 open-addressed tables, chosen by the digest's first byte: one table that grew would hold twice
        # the whole while it is copied.
        self._tables = [bytearray(16 * 16) for _ in range(256)]
        self._counts = [0] * 256

    def add(self, digest: bytes) -> bool:
        """Insert `digest`; True if it was new."""
        which = digest[0]
        table = self._tables[which]
        if not self._insert(table, digest):
            return False
        self._counts[which] += 1
        # Fuller than three quarters: searches in an open-addressed table get long beyond that.
        if self._counts[which] * 64 > len(table) * 3:
            grown = bytearray(2 * len(table))
            for at in range(0, len(table), 16):
                if (entry := bytes(table[at : at + 16])) != bytes(16):
                    self._insert(grown, entry)
            self._tables[which] = grown
        return True

    @property
    def bytes(self) -> int:
        """Size of the tables in memory."""
        return sum(len(table) for table in self._tables)

    @staticmethod
    def _insert(table: bytearray, digest: bytes) -> bool:
        # An empty slot is 16 zero bytes: a digest of zeros would count as new each time, which is harmless.
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
    """Counts of what has been read so far, updated by `documents`."""

    documents: int = 0
    characters: int = 0
    duplicates: int = 0
    bytes_done: int = 0
    """Stored (compressed) bytes read."""
    source_starts: list[int] = field(default_factory=list[int])
    """The first document of each source so far; of the next one, if a source has none."""
    bad: dict[str, int] = field(default_factory=dict[str, int])
    """Number of records left out, by reason."""
    bad_first: list[str] = field(default_factory=list[str])
    """The first of them, as `file, place: reason`."""
    _sha256: Any = field(default_factory=hashlib.sha256)

    def count(self, text: bytes, characters: int) -> None:
        """Add one document, as UTF-8, to the counts and the digest."""
        self.documents += 1
        self.characters += characters
        # The length first, so that a text moved from one document to the next changes the digest.
        self._sha256.update(len(text).to_bytes(8, "little"))
        self._sha256.update(text)

    def begin_source(self, number: int) -> None:
        """Note that the next document, if any, is of source `number`, or of a later one."""
        while len(self.source_starts) <= number:
            self.source_starts.append(self.documents)

    def leave_out(self, where: str, reason: str) -> None:
        """Count one record that was left out."""
        self.bad[reason] = self.bad.get(reason, 0) + 1
        if len(self.bad_first) < _BAD_NAMED:
            self.bad_first.append(f"{where}: {reason}")

    def sha256(self) -> str:
        """Digest over every document's UTF-8 text, each after its length (8 bytes, little-endian)."""
        return self._sha256.hexdigest()
