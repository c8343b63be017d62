"""Sources of token ids: a column of ids, with a column of roles or without, or raw files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from winnow.harvester.plan.records import (
    CHUNK_BYTES,
    BadRecord,
    Reading,
    bad_record,
    jsonl_values,
    parquet_values,
)
from winnow.harvester.plan.sources import SourceFile, open_file
from winnow.schemas.errors import ConfigError


@dataclass(frozen=True)
class IdRules:
    """What ids must be."""

    vocabulary: int
    """Ids are below this."""
    join: int
    """Id of the token that ends a document."""


@dataclass(frozen=True)
class GivenIds:
    """A document that the corpus gives as ids."""

    ids: NDArray[np.uint32]
    roles: tuple[str, ...] | None = None
    """The role of each token; None if the source has none."""

    def __len__(self) -> int:
        return len(self.ids)

    def data(self) -> bytes:
        """What the document is compared and digested by."""
        return self.ids.astype("<u4").tobytes() + "\0".join(self.roles or ()).encode()


def read_ids(reading: Reading, rules: IdRules) -> Iterator[tuple[bytes, GivenIds]]:
    """Yield (bytes to digest, document) of each document of a file."""
    made = _read_raw(reading, rules) if reading.file.format == "raw" else _read_column(reading, rules)
    for document in made:
        if len(document):
            yield document.data(), document


def _read_column(reading: Reading, rules: IdRules) -> Iterator[GivenIds]:
    file = reading.file
    read = parquet_values if file.format == "parquet" else jsonl_values
    roles_column = file.source.roles
    for place, value, beside in read(reading, file.source.column, (roles_column,) if roles_column else ()):
        try:
            ids = _ids(value, file, place)
            names = _roles(beside[0], len(ids), file, place) if roles_column else None
            document = GivenIds(_checked(ids, rules, file, place), names)
        except BadRecord as error:
            reading.settle(error)
            continue
        limit = reading.spec.max_document_chars
        for at in range(0, len(ids), limit):
            part = slice(at, at + limit)
            yield GivenIds(document.ids[part], names[part] if names else None)


def _ids(value: Any, file: SourceFile, place: str) -> NDArray[np.int64]:
    given = cast("list[Any]", value) if isinstance(value, list) else None
    if given is None or not all(type(each) is int and 0 <= each < 2**32 for each in given):
        got = "something else" if given is not None else type(value).__name__
        raise bad_record(file, place, "no token ids", expected="a list of token ids", got=got)
    return np.array(given, np.int64)


def _roles(value: Any, count: int, file: SourceFile, place: str) -> tuple[str, ...]:
    given = cast("list[Any]", value) if isinstance(value, list) else []
    if len(given) != count or not all(isinstance(each, str) and 0 < len(each) <= 64 for each in given):
        raise bad_record(
            file,
            place,
            "no roles",
            expected=f"{count} names of roles in column {file.source.roles!r}, one for each id",
            got=f"{len(given)} values" if isinstance(value, list) else type(value).__name__,
        )
    return tuple(cast("list[str]", given))


def _checked(ids: NDArray[Any], rules: IdRules, file: SourceFile, place: str) -> NDArray[np.uint32]:
    if len(ids) and int(ids.max()) >= rules.vocabulary:
        # Not a bad record that may be left out: these are the ids of another tokenizer.
        raise ConfigError(
            f"corpus file {file.name}{place}",
            expected=f"token ids below {rules.vocabulary}, the subject's vocabulary",
            got=int(ids.max()),
            fix="Give ids of the subject's own tokenizer",
        )
    return ids.astype(np.uint32)


def _read_raw(reading: Reading, rules: IdRules) -> Iterator[GivenIds]:
    """A raw file is a stream of documents, each of which ends with the joining token."""
    file, before = reading.file, reading.tally.bytes_done
    dtype = np.dtype(file.source.dtype).newbyteorder("<")
    limit, offset = reading.spec.max_document_chars, 0
    held, rest = np.empty(0, np.uint32), b""
    with open_file(file) as (stream, raw):
        while chunk := stream.read(CHUNK_BYTES):
            whole = rest + chunk
            size = len(whole) // dtype.itemsize * dtype.itemsize
            rest = whole[size:]
            ids = _checked(np.frombuffer(whole[:size], dtype), rules, file, f", near byte {offset}")
            offset += size
            reading.tally.bytes_done = before + raw.tell()
            held = np.concatenate([held, ids])
            stops = (np.flatnonzero(held == rules.join) + 1).tolist()
            at = 0
            for stop in stops:
                yield from (GivenIds(held[a : min(a + limit, stop)]) for a in range(at, stop, limit))
                at = stop
            while len(held) - at > limit:
                yield GivenIds(held[at : at + limit])
                at += limit
            held = held[at:].copy()
    if rest:
        raise ConfigError(
            f"corpus file {file.name} is cut short",
            expected=f"whole ids of {dtype.itemsize} bytes",
            got=f"{len(rest)} more byte(s)",
            fix="Check the source's dtype, or fetch the file again",
        )
    if len(held):
        yield GivenIds(held)
