"""Text to documents: txt, jsonl and Parquet, streamed, so that memory is flat in the corpus's size.

What a document is:

- txt: the whole file, line ends normalised to `\\n`;
- jsonl, Parquet: a record's text exactly as stored (null is empty text), or with `group_by` the texts of
  consecutive records of one file that agree in those fields, joined with `separator`.

A document longer than `max_document_chars` is cut (see `cut`) and each piece is a document of its own from
then on. Documents without anything but white space are skipped. Text must be UTF-8; a byte-order mark at
the start of a file is dropped.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from harvester.sources import SourceFile, find_files, open_file
from harvester.tally import DigestSet, Tally
from schemas.corpus import CorpusSpec
from schemas.errors import ConfigError

CHUNK_BYTES = 2**16
"""Read at once. Small on purpose: blocks of a megabyte, freed between longer-lived documents, left holes in
glibc's heap that grew by hundreds of MiB over a large text file."""
MAX_RECORD_BYTES = 64 * 2**20
"""Longest line of a jsonl file."""
PARQUET_ROWS = 64
"""Rows decoded together: few, since a row may hold a book."""
_BOM = codecs.BOM_UTF8


def documents(
    spec: CorpusSpec, tally: Tally | None = None, files: Sequence[SourceFile] | None = None
) -> Iterator[str]:
    """Every document of the corpus, in order, without empty ones and (if asked) without duplicates.

    Args:
        spec: The corpus.
        tally: Counts and digest, updated while the iterator runs.
        files: `find_files(spec)`, where the caller has it already.

    Raises:
        ConfigError: Not UTF-8, a column that is absent, a record of another kind, an empty corpus: file
            and place are named.
        StoreError: A file cannot be read.
    """
    tally = tally or Tally()
    seen = DigestSet() if spec.deduplicate else None
    files = find_files(spec) if files is None else files
    for file in files:
        before = tally.bytes_done
        for text in _READERS[file.format](file, spec.max_document_chars, tally):
            if not text or text.isspace():
                continue
            data = text.encode()
            if seen is not None and not seen.add(hashlib.blake2b(data, digest_size=16).digest()):
                tally.duplicates += 1
                continue
            tally.count(data, len(text))
            yield text
        tally.bytes_done = before + (file.size or 0)
    if tally.documents == 0:
        raise ConfigError(
            "corpus.sources hold no text",
            expected="at least one document that is more than white space",
            got=f"none in {len(files)} file(s)",
            fix="Check the files and the column",
        )


def cut(text: str, start: int, limit: int) -> int:
    """Where the piece of `text` that begins at `start` ends, at most `limit` characters on.

    After the last blank line, else the last line end, else the last space, of the second half of the
    piece (so that no piece is tiny); else at the limit itself.
    """
    stop, half = start + limit, start + limit // 2
    for mark in ("\n\n", "\n", " "):
        at = text.rfind(mark, half, stop)
        if at >= 0:
            return at + len(mark)
    return stop


class _Cutter:
    """Gathers text and gives it back in pieces of at most `limit` characters."""

    def __init__(self, limit: int) -> None:
        self._limit, self._parts, self._length = limit, list[str](), 0

    def feed(self, text: str) -> Iterator[str]:
        self._parts.append(text)
        self._length += len(text)
        if self._length <= self._limit:
            return
        whole, start = "".join(self._parts), 0
        while len(whole) - start > self._limit:
            stop = cut(whole, start, self._limit)
            yield whole[start:stop]
            start = stop
        self._parts, self._length = [whole[start:]], len(whole) - start

    def flush(self) -> Iterator[str]:
        if self._parts:
            yield "".join(self._parts)
        self._parts, self._length = [], 0


def _read_txt(file: SourceFile, limit: int, tally: Tally) -> Iterator[str]:
    cutter, before, offset = _Cutter(limit), tally.bytes_done, 0
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    with open_file(file) as (stream, raw):
        while True:
            chunk = stream.read(CHUNK_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise _not_utf8(f"corpus file {file.name}", offset - pending + error.start, error) from error
            if offset == 0:
                text = text.removeprefix("\ufeff")
            offset += len(chunk)
            tally.bytes_done = before + raw.tell()
            yield from cutter.feed(newlines.decode(text, final=not chunk))
            if not chunk:
                break
    yield from cutter.flush()


def _read_jsonl(file: SourceFile, limit: int, tally: Tally) -> Iterator[str]:
    before = tally.bytes_done

    def records() -> Iterator[tuple[str, tuple[Any, ...]]]:
        with open_file(file) as (stream, raw):
            for number, offset, line in _lines(stream, file):
                tally.bytes_done = before + raw.tell()
                if line.strip():
                    yield _parse(line, file, number, offset)

    yield from _group(file, limit, records())


def _read_parquet(file: SourceFile, limit: int, tally: Tally) -> Iterator[str]:
    yield from _group(file, limit, _parquet_records(file, tally))


def _group(file: SourceFile, limit: int, records: Iterator[tuple[str, tuple[Any, ...]]]) -> Iterator[str]:
    cutter, grouped, current = _Cutter(limit), bool(file.source.group_by), None
    for text, group in records:
        if grouped and group == current:
            yield from cutter.feed(file.source.separator)
        else:
            yield from cutter.flush()
        yield from cutter.feed(text)
        current = group
    yield from cutter.flush()


def _lines(stream: IO[bytes], file: SourceFile) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, byte offset of the line, the line without its end)."""
    number, offset, held, length = 1, 0, list[bytes](), 0
    while chunk := stream.read(CHUNK_BYTES):
        held.append(chunk)
        length += len(chunk)
        if b"\n" in chunk:
            *lines, rest = b"".join(held).split(b"\n")
            for line in lines:
                yield number, offset, line
                number, offset = number + 1, offset + len(line) + 1
            held, length = [rest], len(rest)
        if length > MAX_RECORD_BYTES:
            raise ConfigError(
                f"corpus file {file.name}, line {number} is too long",
                expected=f"at most {MAX_RECORD_BYTES} bytes a line",
                got=f"over {length}",
                fix="Write one JSON value a line, or set the source's format",
            )
    yield number, offset, b"".join(held)


def _parse(line: bytes, file: SourceFile, number: int, offset: int) -> tuple[str, tuple[Any, ...]]:
    """One jsonl line as (text, values of group_by); null is empty text."""
    where, source = f"corpus file {file.name}, line {number}", file.source
    skipped = 0
    if number == 1 and line.startswith(_BOM):
        line, skipped = line[len(_BOM) :], len(_BOM)
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _not_utf8(f"corpus file {file.name}", offset + skipped + error.start, error) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(where, expected="one JSON value a line", got=str(error)) from error
    if isinstance(value, str) and not source.group_by:
        return _text(value, where), ()
    if not isinstance(value, dict):
        expected = "a JSON object" if source.group_by else "a JSON object or string"
        raise ConfigError(where, expected=expected, got=f"a JSON {type(value).__name__}")
    _check_columns(where, value, file)
    return _text(value[source.column], where), tuple(_plain(value[name]) for name in source.group_by)


def _parquet_records(file: SourceFile, tally: Tally) -> Iterator[tuple[str, tuple[Any, ...]]]:
    import pyarrow.parquet as pq

    source, before = file.source, tally.bytes_done
    with open_file(file) as (stream, _), _readable(file):
        # buffer_size: else a whole column chunk, as large as its writer pleased, is read at once
        parquet = pq.ParquetFile(stream, buffer_size=CHUNK_BYTES, pre_buffer=False)
        schema = parquet.schema_arrow
        _check_columns(f"corpus file {file.name}", schema.names, file)
        columns = list(dict.fromkeys((source.column, *source.group_by)))
        if twice := [name for name in columns if schema.names.count(name) > 1]:
            where = f"corpus file {file.name}, column {twice[0]!r}"
            raise ConfigError(where, expected="one column of that name", got=schema.names.count(twice[0]))
        kind = schema.field(source.column).type
        if not _is_text(kind):
            where = f"corpus file {file.name}, column {source.column!r}"
            raise ConfigError(where, expected="text", got=str(kind))
        row, rows = 0, max(parquet.metadata.num_rows, 1)
        for batch in parquet.iter_batches(PARQUET_ROWS, columns=columns, use_threads=False):
            # Arrow's own values, which compare whatever their type; Python has no year 40,000 or nanoseconds
            groups = [_plain_column(batch.column(name)) for name in source.group_by]
            for index, text in enumerate(_texts(_plain_column(batch.column(source.column)))):
                where = f"corpus file {file.name}, row {row + index}"
                yield _text(text, where), tuple(group[index] for group in groups)
            row += len(batch)
            tally.bytes_done = before + (file.size or 0) * row // rows


@contextmanager
def _readable(file: SourceFile) -> Generator[None]:
    """Arrow's complaints about the file as a `ConfigError`."""
    import pyarrow as pa

    try:
        yield
    except pa.ArrowException as error:
        raise ConfigError(
            f"corpus file {file.name}",
            expected="a Parquet file that Arrow reads",
            got=" ".join(str(error).split()),
        ) from error


def _is_text(kind: Any) -> bool:
    """Whether a column of this Arrow type may hold text: also bytes, as older writers mark it."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        return _is_text(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    tests = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return any(getattr(pa.types, f"is_{name}")(kind) for name in tests)


def _plain_column(column: Any) -> Any:
    """`column` without the extension type or the dictionary around its values."""
    import pyarrow as pa

    if isinstance(column, pa.ExtensionArray):
        return _plain_column(column.storage)
    return column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column


def _texts(column: Any) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # as bytes, so that the row can be named
        return [value.as_buffer().to_pybytes() if value.is_valid else None for value in column]


def _check_columns(where: str, names: Any, file: SourceFile) -> None:
    for wanted in (file.source.column, *file.source.group_by):
        if wanted not in names:
            field = "column" if wanted == file.source.column else "group_by"
            raise ConfigError(
                f"{where} has no column {wanted!r}",
                expected=f"one of {', '.join(map(str, names)) or '(it has none)'}",
                got=repr(wanted),
                fix=f"Set corpus.sources[].{field} to a column that is there",
            )


def _text(value: Any, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise _not_utf8(where, error.start, error) from error
    if not isinstance(value, str):
        raise ConfigError(where, expected="text in the column", got=type(value).__name__)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            where, expected="valid Unicode", got=f"a lone surrogate at character {error.start}"
        ) from error
    return value


def _plain(value: Any) -> Any:
    """`value` as something that compares by content (1 and True stay apart)."""
    return type(value).__name__, value


def _not_utf8(where: str, offset: int, error: UnicodeDecodeError) -> ConfigError:
    return ConfigError(
        f"{where} is not UTF-8 at byte {offset}",
        expected="UTF-8",
        got=f"0x{error.object[error.start]:02x} ({error.reason})",
        fix="Convert it, for instance with iconv -f ENCODING -t utf-8",
    )


_READERS: dict[str, Callable[[SourceFile, int, Tally], Iterator[str]]] = {
    "txt": _read_txt,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}
