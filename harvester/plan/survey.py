"""Looks at a corpus before there is a config: how its files are read, and how many tokens they hold.

The figures are estimates from the beginnings of a few files; `winnow plan` counts.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

from winnow.harvester.plan.chat import chat_templates
from winnow.harvester.plan.corpus import documents
from winnow.harvester.plan.sources import SourceFile, find_files, open_file
from winnow.harvester.plan.tally import Tally
from winnow.harvester.plan.tokenise import DocumentTokenizer, batches
from winnow.schemas.corpus import CorpusSpec, SourceSpec
from winnow.schemas.errors import ConfigError
from winnow.schemas.harvest import PlanSpec
from winnow.subject.load import Subject

SAMPLE_BYTES = 8 * 2**20
"""Bytes that are tokenised of all files together."""
_SAMPLED_FILES = 4
"""Files sampled per kind of source."""
_LONGEST_LINE = 64 * 2**20
_TEXT, _CHAT, _TOKENS = "text", "messages", "input_ids"


class Survey(NamedTuple):
    """A corpus as sampled."""

    corpus: CorpusSpec
    files: int
    bytes: int | None
    """Stored bytes of all files; None if the file system does not tell them."""
    tokens: int | None
    """Estimate of all tokens; None if `bytes` is."""
    median_tokens: int
    """Tokens of the median document."""
    documents: int | None
    """Estimate of all documents."""
    whole: bool
    """Whether all of it was read, so that the figures are counts."""

    @property
    def chat(self) -> bool:
        """Whether there are conversations in it."""
        return any(source.format == "chat" for source in self.corpus.sources)


def describe_sources(
    uris: Sequence[str], column: str | None = None, template: str | None = None
) -> tuple[SourceSpec, ...]:
    """How each URI's files are read, judged by the first record of the first of them.

    Args:
        uris: Paths, patterns or URIs, as in `corpus.sources`.
        column: The column to read; None finds it: `messages`, `text`, `input_ids`, or the only column of
            its kind.
        template: Jinja file with the chat template of conversations; None takes the tokenizer's.

    Raises:
        ConfigError: Nothing there, a format that cannot be told, or a column that cannot be chosen.
        StoreError: A file cannot be read.
    """
    found: list[SourceSpec] = []
    for uri in uris:
        first = find_files(CorpusSpec(sources=(SourceSpec(uri=uri),)))[0]
        found.append(_source(uri, first, column, template))
    if template is not None and not any(source.format == "chat" for source in found):
        raise ConfigError("--template", expected="a corpus of conversations", got="none in the files")
    return tuple(found)


def survey(corpus: CorpusSpec, subject: Subject) -> Survey:
    """Sample a corpus with the subject's tokenizer.

    Args:
        corpus: How it is read.
        subject: Its tokenizer is used; an outline is enough.

    Raises:
        ConfigError: A record that cannot be read, no text at all, or a chat without a template.
    """
    files = find_files(corpus)
    templates = chat_templates(corpus, subject.tokenizer, subject.spec.model)
    # The hook does not matter to a tokenizer; the contract wants one.
    spec = PlanSpec(hooks=("resid_post.0",))
    tokenizer = DocumentTokenizer(subject.tokenizer, subject.identity, spec, templates=templates)
    kinds: dict[tuple[str, str, str], list[SourceFile]] = {}
    for file in files:
        kinds.setdefault((file.source.format, file.source.column, file.format), []).append(file)
    lengths: list[int] = []
    tokens = held = 0.0
    known = all(file.size is not None for file in files)
    whole = True
    for of_kind in kinds.values():
        chosen = _spread(of_kind, _SAMPLED_FILES)
        budget = SAMPLE_BYTES // len(kinds) // len(chosen)
        tally, mine, read = Tally(), list[int](), 0
        for file in chosen:
            before = tally.bytes_done
            source = documents(corpus, tally, [file], templates, tokenizer.rules)
            for batch in batches(_until(source, tally, before + budget)):
                mine += [len(made) for made in tokenizer(batch)]
            read += tally.bytes_done - before
            whole = whole and tally.bytes_done - before >= (file.size or 0)
        whole = whole and len(chosen) == len(of_kind)
        lengths += mine
        if known:
            # Of each kind by itself: a Parquet file holds several times the tokens of a text file per byte.
            share = sum(file.size or 0 for file in of_kind) / max(read, 1)
            tokens, held = tokens + share * sum(mine), held + share * len(mine)
    return Survey(
        corpus,
        len(files),
        sum(file.size or 0 for file in files) if known else None,
        round(tokens) if known else None,
        int(statistics.median(lengths)),
        round(held) if known else None,
        whole,
    )


def _until(source: Iterator[Any], tally: Tally, stop: int) -> Iterator[Any]:
    for document in source:
        yield document
        if tally.bytes_done >= stop:
            return


def _spread(files: list[SourceFile], count: int) -> list[SourceFile]:
    """At most `count` files, evenly over the list; empty ones only if there are no others."""
    full = [file for file in files if file.size != 0] or files
    step = max(len(full) / count, 1.0)
    return [full[int(at * step)] for at in range(min(count, len(full)))]


def _source(uri: str, first: SourceFile, column: str | None, template: str | None) -> SourceSpec:
    if first.format == "txt":
        if column is not None:
            raise ConfigError("--column", expected="JSON lines or Parquet", got=f"{first.name}, plain text")
        return SourceSpec(uri=uri)
    record = _first_record(first)
    kinds = {name: kind for name, value in record.items() if (kind := _kind(value)) is not None}
    if column is None:
        column = _choose(kinds)
    if column is None or column not in kinds:
        raise ConfigError(
            f"corpus file {first.name}",
            expected="a column with text, messages (objects with role and content) or token ids"
            if column is None
            else f"column {column!r} with text, messages or token ids",
            got=", ".join(f"{name} ({kinds.get(name, 'neither')})" for name in record) or "no column",
            fix="Name one of them with --column" if kinds else "Turn it into one of these",
        )
    if kinds[column] == _TEXT:
        return SourceSpec(uri=uri, column=column)
    if kinds[column] == _TOKENS:
        return SourceSpec(uri=uri, format="tokens", column=column)
    return SourceSpec(uri=uri, format="chat", column=column, template=template)


def _choose(kinds: dict[str, str]) -> str | None:
    """The column of the usual name, else the only one of its kind; conversations before text before ids."""
    for kind in (_CHAT, _TEXT, _TOKENS):
        of_kind = [name for name, each in kinds.items() if each == kind]
        if kind in of_kind or len(of_kind) == 1:
            return kind if kind in of_kind else of_kind[0]
        # Two texts without the usual name are a question: what the user wants is not in the file.
        if of_kind:
            return None
    return None


def _kind(value: Any) -> str | None:
    if isinstance(value, str):
        # Parquet files often hold messages as JSON.
        parsed = _json_list(value) if value.startswith("[") else None
        return _CHAT if parsed is not None and _kind(parsed) == _CHAT else _TEXT
    if not isinstance(value, list) or not value:
        return None
    items = cast("list[Any]", value)
    if all(isinstance(item, dict) and ("role" in item or {"from", "value"} <= item.keys()) for item in items):
        return _CHAT
    return _TOKENS if all(type(item) is int for item in items) else None


def _json_list(text: str) -> list[Any] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return cast("list[Any]", found) if isinstance(found, list) else None


def _first_record(file: SourceFile) -> dict[str, Any]:
    """The first record of a jsonl or Parquet file, by column; empty if there is none."""
    with open_file(file) as (stream, _):
        if file.format == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            try:
                parquet = pq.ParquetFile(stream)
                rows = next(parquet.iter_batches(1, use_threads=False), None)
            except (pa.ArrowException, OSError) as error:
                raise ConfigError(
                    f"corpus file {file.name} is damaged", expected="Parquet", got=str(error)[:200]
                ) from error
            return rows.to_pylist()[0] if rows is not None and len(rows) else {}
        line = next(
            (line for line in iter(lambda: stream.readline(_LONGEST_LINE), b"") if line.strip()), b"{}"
        )
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ConfigError(
            f"corpus file {file.name}", expected="a JSON object per line", got=str(error)[:200]
        ) from error
    if isinstance(value, dict):
        return cast("dict[str, Any]", value)
    # A line may be the conversation itself.
    return {_CHAT: value} if isinstance(value, list) else {}
