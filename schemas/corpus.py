"""Which text is read, and how it becomes documents."""

from __future__ import annotations

from typing import Any, Literal, Self, cast

from pydantic import Field, model_validator

from winnow.schemas.base import Contract


class SourceSpec(Contract):
    """One place that text comes from: a URI, which may contain wildcards, and how to read it."""

    uri: str = Field(min_length=1)
    """Any fsspec URI or path (`s3://b/x/*.parquet`, `data/*.txt`), or `package://DIST/PATTERN` for files that
    an installed Python distribution ships. Matches are read in sorted order. If a file of exactly this name
    exists (`part[1].jsonl`), it is read, and the name is not taken for a pattern."""
    format: Literal["auto", "txt", "jsonl", "parquet", "chat", "tokens"] = "auto"
    """Format of the files. `auto` follows the file name: .txt, .jsonl, .ndjson or .parquet, all but Parquet
    also with .gz, .bz2, .xz or .zst, which are unpacked whatever the format. `chat`: conversations, in jsonl
    or Parquet by the file name, rendered by a chat template. `tokens`: ids of the subject's tokenizer, in
    jsonl or Parquet, or raw in .bin files, in which each document ends with the joining token."""
    column: str = "text"
    """jsonl and Parquet: name of the field that contains the text; of a chat, its messages (default
    `messages`, and a field `tools` is passed to the template); of tokens, their ids (default `input_ids`)."""
    # Consecutive records only: to join them across a file, all of it would have to be in memory.
    group_by: tuple[str, ...] = ()
    """jsonl and Parquet: consecutive records of a file that agree in these fields are joined into one
    document. Empty, the default, makes each record a document."""
    separator: str = "\n"
    """Text between the joined records of a group."""
    # These two are left out of the JSON while unset: plans stored before them keep their fingerprints.
    template: str | None = Field(default=None, min_length=1, exclude_if=lambda path: path is None)
    """chat: path or URI of a Jinja file with the chat template. Null, the default, takes the tokenizer's. The
    plan records the template's digest."""
    unproved: Literal["refuse", "skip"] = Field(default="refuse", exclude_if=lambda how: how == "refuse")
    """chat: what is done with a conversation of which the planner cannot prove where its messages are in the
    rendered text: `refuse` ends the plan and names it; `skip` leaves it out and counts it."""

    roles: str | None = Field(default=None, min_length=1, exclude_if=lambda column: column is None)
    """tokens: name of a field with the name of each token's role. Null, the default: tokens have no role."""
    dtype: Literal["uint16", "uint32"] = Field(default="uint16", exclude_if=lambda kind: kind == "uint16")
    """tokens: little-endian type of the ids in .bin files."""

    @model_validator(mode="before")
    @classmethod
    def _named_column(cls, fields: Any) -> Any:
        # The default is another for each format; `column` itself keeps one default, which stored plans have.
        if isinstance(fields, dict):
            given = cast("dict[str, Any]", fields)
            column = {"chat": "messages", "tokens": "input_ids"}.get(str(given.get("format")))
            return {"column": column, **given} if column else given
        return fields

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.format in ("chat", "tokens") and self.group_by:
            raise ValueError(f"group_by does not go with format {self.format}: a record is a document")
        if self.format != "tokens" and (self.roles is not None or self.dtype != "uint16"):
            raise ValueError("roles and dtype go with format tokens only")
        if self.format != "chat" and (self.template is not None or self.unproved != "refuse"):
            raise ValueError("template and unproved go with format chat only")
        return self


class CorpusSpec(Contract):
    """The corpus: sources in order, and how long one document may be. Part of the dataset's identity."""

    sources: tuple[SourceSpec, ...] = Field(min_length=1)
    """Sources, read one after the other: another order is another dataset."""
    max_document_chars: int = Field(default=200_000, ge=200)
    """Largest document, in characters. A longer one is cut at its last blank line, line end or space before
    that (looking back over half of them), so that memory stays flat however long a file is. From then on each
    piece is a document of its own: held out, counted and compared by itself."""
    deduplicate: bool = True
    """Drop a document that equals an earlier one, compared by 128-bit digests: about 32 bytes of memory per
    document."""
    # Left out of the JSON while it is the default: plans stored before it existed keep their fingerprints.
    bad_records: Literal["refuse", "skip"] = Field(default="refuse", exclude_if=lambda how: how == "refuse")
    """What is done with a record without readable text: a line that is not JSON or longer than 64 MiB, a key
    that stands twice, an absent column, text of another type, not UTF-8 or with NUL bytes. `refuse` ends the
    plan and names it; `skip` leaves it out and counts it. So it is with a conversation that is none, or that
    the chat template refuses. A record of txt is the whole file, which `skip` reads twice. A damaged file,
    and a Parquet file without the column, are always refused. Null counts as empty text."""
