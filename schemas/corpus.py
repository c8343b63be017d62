"""What text is read, and how it becomes documents."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from winnow.schemas.base import Contract


class SourceSpec(Contract):
    """One place text comes from: a URI that may hold wildcards, and how to read it."""

    uri: str = Field(min_length=1)
    """Any fsspec URI or path (`s3://b/x/*.parquet`, `data/*.txt`), or `package://DIST/PATTERN` for
    files an installed Python distribution ships. Matches are read in sorted order. What exists as it is
    written (`part[1].jsonl`) is that file, and no pattern."""
    format: Literal["auto", "txt", "jsonl", "parquet"] = "auto"
    """`auto` follows the file name (.txt, .jsonl, .ndjson, .parquet; all but Parquet also with
    .gz/.bz2/.xz/.zst, which are unpacked whatever the format)."""
    column: str = "text"
    """jsonl and Parquet: the field that holds the text."""
    group_by: tuple[str, ...] = ()
    """jsonl and Parquet: consecutive records of a file that are equal in these fields are joined into
    one document."""
    separator: str = "\n"
    """What joins the records of one group."""


class CorpusSpec(Contract):
    """The corpus: sources in order, and how long one document may be."""

    sources: tuple[SourceSpec, ...] = Field(min_length=1)
    """Read one after the other; the order is part of the dataset's identity."""
    max_document_chars: int = Field(default=200_000, ge=200)
    """A longer document is cut at its last blank line, line end or space before this many characters
    (looking back over half of them), so that memory stays flat however long a file is. Each piece is a
    document of its own from then on: held out, counted and compared by itself."""
    deduplicate: bool = True
    """Drop a document equal to an earlier one (by 128-bit digest; about 32 bytes of memory a document)."""
    bad_records: Literal["refuse", "skip"] = Field(default="refuse", exclude_if=lambda how: how == "refuse")
    """What a record without readable text does (a line that is no JSON or beyond 64 MiB, an absent column,
    text of another type or not UTF-8): `refuse` ends the plan and names it, `skip` leaves it out and counts
    it. A record of txt is the whole file, which is then read twice. A file that is damaged, or a Parquet file
    without the column, is always refused. Null is empty text."""
