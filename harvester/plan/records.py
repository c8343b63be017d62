"""Reads the records of a jsonl or Parquet file one by one: text, and the values it is grouped by."""

from __future__ import annotations

import codecs
import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from typing import IO, Any

from winnow.harvester.plan.sources import SourceFile, open_file
from winnow.harvester.plan.tally import Tally
from winnow.schemas.corpus import CorpusSpec
from winnow.schemas.errors import ConfigError

# Small on purpose: blocks of a megabyte, freed between longer-lived documents, left holes in glibc's heap
# that grew by hundreds of MiB over a large text file.
CHUNK_BYTES = 2**16
"""Bytes read at once."""
# A file that is one JSON array on one line would otherwise be read into memory whole.
MAX_RECORD_BYTES = 64 * 2**20
"""Longest line of a jsonl file."""
# Few, since a row may hold a book.
_PARQUET_ROWS = 64
"""Rows decoded together."""
_BOM = codecs.BOM_UTF8

Record = tuple[str, tuple[Any, ...]]
"""(text, values of `group_by`, which compare)."""


class BadRecord(ConfigError):
    """One record without readable text, in a file that can be read."""

    place = ""
    """Where in the file: `, line 3`."""
    reason = ""


@dataclass(frozen=True)
class Reading:
    """One file on its way to documents."""

    file: SourceFile
    spec: CorpusSpec
    tally: Tally

    def settle(self, error: BadRecord) -> None:
        """Count the record as left out, or raise `error`, as `corpus.bad_records` says."""
        if self.spec.bad_records == "refuse":
            raise error
        self.leave_out(error.place, error.reason)

    def leave_out(self, place: str, reason: str) -> None:
        """Count a record that was left out."""
        self.tally.leave_out(PurePath(self.file.path).name + place, reason)


def jsonl_records(reading: Reading) -> Iterator[Record]:
    """Yield the records of a jsonl file; blank lines are skipped."""
    before = reading.tally.bytes_done
    with open_file(reading.file) as (stream, raw):
        for number, offset, line in _lines(stream, reading):
            reading.tally.bytes_done = before + raw.tell()
            if not line.strip():
                continue
            try:
                record = _parse(line, reading.file, number, offset)
            except BadRecord as error:
                reading.settle(error)
                continue
            yield record


def parquet_records(reading: Reading) -> Iterator[Record]:
    """Yield the rows of a Parquet file as records."""
    # Here, not above: a corpus of text files needs no pyarrow.
    import pyarrow.parquet as pq

    file, tally = reading.file, reading.tally
    source, before = file.source, tally.bytes_done
    with open_file(file) as (stream, _), _arrow_errors(file):
        # buffer_size: otherwise a whole column chunk, of whatever size its writer chose, is read at once
        parquet = pq.ParquetFile(stream, buffer_size=CHUNK_BYTES, pre_buffer=False)
        columns = _text_and_groups(parquet.schema_arrow, file)
        row, rows = 0, max(parquet.metadata.num_rows, 1)
        # Without Arrow's threads: reading is one stage of three, and the cores are the tokenizer's.
        for batch in parquet.iter_batches(_PARQUET_ROWS, columns=columns, use_threads=False):
            # Arrow's own values, which compare whatever their type; Python has no year 40,000 or nanoseconds
            groups = [_plain_column(batch.column(name)) for name in source.group_by]
            for index, value in enumerate(_texts(_plain_column(batch.column(source.column)))):
                try:
                    text = _text(value, file, f", row {row + index}")
                except BadRecord as error:
                    reading.settle(error)
                    continue
                yield text, tuple(group[index] for group in groups)
            row += len(batch)
            # By rows: a Parquet reader jumps about in its file, so the position says nothing of progress.
            tally.bytes_done = before + (file.size or 0) * row // rows


def jsonl_values(
    reading: Reading, column: str, beside: Sequence[str]
) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Yield (place, value of `column`, those of `beside`, None if absent) of each record of a jsonl file."""
    file, before = reading.file, reading.tally.bytes_done
    with open_file(file) as (stream, raw):
        for number, offset, line in _lines(stream, reading):
            reading.tally.bytes_done = before + raw.tell()
            if not line.strip():
                continue
            place = f", line {number}"
            try:
                value = _json(line, file, number, offset)
                # A line may be the value itself.
                record = value if isinstance(value, dict) else {column: value}
                if column not in record:
                    raise bad_record(file, place, "no such column", **_no_column(column, record, file, place))
            except BadRecord as error:
                reading.settle(error)
                continue
            yield place, record[column], tuple(record.get(name) for name in beside)


def parquet_values(
    reading: Reading, column: str, beside: Sequence[str]
) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Yield (place, value of `column`, those of `beside`, None if absent) of each row of a Parquet file."""
    import pyarrow.parquet as pq

    file, tally = reading.file, reading.tally
    before, row = tally.bytes_done, 0
    with open_file(file) as (stream, _), _arrow_errors(file):
        parquet = pq.ParquetFile(stream, buffer_size=CHUNK_BYTES, pre_buffer=False)
        names = parquet.schema_arrow.names
        if column not in names:
            parts = _no_column(column, names, file, "")
            raise ConfigError(parts.pop("what"), **parts)
        rows = max(parquet.metadata.num_rows, 1)
        chosen = [name for name in (column, *beside) if name in names]
        _refuse_repeated(names, chosen, file)
        for batch in parquet.iter_batches(_PARQUET_ROWS, columns=chosen, use_threads=False):
            columns = (_values(batch.column(name)) for name in chosen)
            for index, values in enumerate(zip(*columns, strict=True)):
                place = f", row {row + index}"
                if error := next((value for value in values if isinstance(value, UnicodeDecodeError)), None):
                    reading.settle(not_utf8(file, place, error.start, error, row=f"{place}, a text in it,"))
                    continue
                found = dict(zip(chosen, values, strict=True))
                yield place, found[column], tuple(found.get(name) for name in beside)
            row += len(batch)
            tally.bytes_done = before + (file.size or 0) * row // rows


def not_utf8(
    file: SourceFile, place: str, offset: int, error: UnicodeDecodeError, row: str = ""
) -> BadRecord:
    """The error for bytes that are not text; `offset` counts from the start of the file, or of `row`."""
    return bad_record(
        file,
        place,
        "not UTF-8",
        what=f"corpus file {file.name}{row} is not UTF-8 at byte {offset}",
        expected="UTF-8",
        got=f"0x{error.object[error.start]:02x} ({error.reason})",
        fix="Convert it, for instance with iconv -f ENCODING -t utf-8",
    )


def has_nul(file: SourceFile, place: str, offset: int) -> BadRecord:
    """The error for a NUL byte, which no text has; `offset` counts from the start of the file."""
    # UTF-16 of Latin or Cyrillic letters without a byte-order mark is valid UTF-8 with control characters.
    return bad_record(
        file,
        place,
        "not text",
        what=f"corpus file {file.name}{place} is not text",
        expected="UTF-8",
        got=f"a NUL at byte {offset}, as in UTF-16, UTF-32 and binary files",
        fix="Convert it, for instance with iconv -f UTF-16LE -t utf-8",
    )


def key_twice(file: SourceFile, place: str, error: KeyTwice) -> BadRecord:
    """The error for a JSON object with a key twice: which of the two values is meant cannot be told."""
    got = f"{str(error)[:80]!r} twice"
    return bad_record(file, place, "a key twice", expected="every key of an object once", got=got)


def bad_record(
    file: SourceFile, place: str, reason: str, *, fix: str = "Correct it", **parts: Any
) -> BadRecord:
    """The error for one record; `reason` is what it is counted under if it is left out."""
    what = parts.pop("what", f"corpus file {file.name}{place}")
    error = BadRecord(what, fix=f"{fix}; or set corpus.bad_records to skip", **parts)
    error.place, error.reason = place, reason
    return error


def _lines(stream: IO[bytes], reading: Reading) -> Iterator[tuple[int, int, bytes]]:
    """Yield (line number from 1, byte offset of the line, the line without its end)."""
    # Not by iterating over the stream: that has no bound on a line's length. Pieces of a long line are joined
    # once, when its end has come.
    number, offset, held, length, ahead = 1, 0, list[bytes](), 0, b""
    while chunk := ahead or stream.read(CHUNK_BYTES):
        ahead = b""
        held.append(chunk)
        length += len(chunk)
        if b"\n" in chunk:
            *lines, rest = b"".join(held).split(b"\n")
            for line in lines:
                if len(line) > MAX_RECORD_BYTES:
                    reading.settle(_too_long(reading.file, number))
                else:
                    yield number, offset, line
                number, offset = number + 1, offset + len(line) + 1
            held, length = [rest], len(rest)
        if length > MAX_RECORD_BYTES:
            reading.settle(_too_long(reading.file, number))
            # With `bad_records: skip`: pass over the rest of the line without keeping it.
            while (chunk := stream.read(CHUNK_BYTES)) and b"\n" not in chunk:
                length += len(chunk)
            end, _, ahead = chunk.partition(b"\n")
            number, offset = number + 1, offset + length + len(end) + 1
            held, length = [], 0
    yield number, offset, b"".join(held)


def _too_long(file: SourceFile, number: int) -> BadRecord:
    return bad_record(
        file,
        f", line {number}",
        "line too long",
        what=f"corpus file {file.name}, line {number} is too long",
        expected=f"at most {MAX_RECORD_BYTES} bytes per line",
        got="more",
        fix="Write one JSON value per line, or set the source's format",
    )


def _json(line: bytes, file: SourceFile, number: int, offset: int) -> Any:
    place, skipped = f", line {number}", 0
    if number == 1 and line.startswith(_BOM):
        line, skipped = line[len(_BOM) :], len(_BOM)
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(file, place, offset + skipped + error.start, error) from error
    if (nul := line.find(0)) >= 0:  # JSON has none, not even in its strings
        raise has_nul(file, place, offset + skipped + nul)
    try:
        return parse_json(text)
    except KeyTwice as error:
        raise key_twice(file, place, error) from error
    except (ValueError, RecursionError) as error:  # the latter: thousands of nested brackets
        expected, got = "one JSON value per line", str(error)
        if b"\r" in line.strip():
            expected, got = f"{expected}, each ending with a line feed", f"carriage returns alone ({got})"
        raise bad_record(file, place, "not JSON", expected=expected, got=got) from error


class KeyTwice(ValueError):
    """A JSON object has a key twice; its text is the key."""


def parse_json(text: str) -> Any:
    """Parse JSON; KeyTwice (a ValueError) where Python's own parser would keep the last of two values."""
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise KeyTwice(next(key for key in keys if keys.count(key) > 1))
    return made


def _parse(line: bytes, file: SourceFile, number: int, offset: int) -> Record:
    """Parse one jsonl line; null is empty text."""
    place, source = f", line {number}", file.source
    value = _json(line, file, number, offset)
    if isinstance(value, str) and not source.group_by:
        return _text(value, file, place), ()
    if not isinstance(value, dict):
        expected = "a JSON object" if source.group_by else "a JSON object or string"
        raise bad_record(file, place, "no record", expected=expected, got=f"a JSON {type(value).__name__}")
    if lacking := _lacking(value, file):
        raise bad_record(file, place, "no such column", **_no_column(lacking, value, file, place))
    return _text(value[source.column], file, place), tuple(_plain(value[name]) for name in source.group_by)


@contextmanager
def _arrow_errors(file: SourceFile) -> Generator[None]:
    """Turn Arrow's errors about the file into a `ConfigError`."""
    import pyarrow as pa

    try:
        yield
    except pa.ArrowException as error:
        raise ConfigError(
            f"corpus file {file.name}",
            expected="a Parquet file that Arrow reads",
            got=" ".join(str(error).split()),
        ) from error


def _text_and_groups(schema: Any, file: SourceFile) -> list[str]:
    """The columns to read; ConfigError if one is absent or repeated, or the text column holds no text."""
    source = file.source
    if lacking := _lacking(schema.names, file):
        parts = _no_column(lacking, schema.names, file, "")
        raise ConfigError(parts.pop("what"), **parts)
    columns = list(dict.fromkeys((source.column, *source.group_by)))
    _refuse_repeated(schema.names, columns, file)
    kind = schema.field(source.column).type
    if not _is_text(kind):
        where = f"corpus file {file.name}, column {source.column!r}"
        raise ConfigError(where, expected="text", got=str(kind))
    return columns


def _refuse_repeated(names: list[str], columns: list[str], file: SourceFile) -> None:
    for name in columns:
        if (count := names.count(name)) > 1:
            where = f"corpus file {file.name}, column {name!r}"
            raise ConfigError(where, expected="one column of that name", got=count)


def _is_text(kind: Any) -> bool:
    """Whether a column of this Arrow type may hold text; bytes count, since older writers mark it so."""
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


def _values(column: Any) -> list[Any]:
    """The values of a column; in the place of one with a text that is not UTF-8, the error."""
    plain = _plain_column(column)
    try:
        return plain.to_pylist()
    except UnicodeDecodeError:  # which of the rows it is, is not in the error
        return [_value(each) for each in plain]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def _texts(column: Any) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # as bytes: Arrow's error does not name the row
        return [value.as_buffer().to_pybytes() if value.is_valid else None for value in column]


def _lacking(names: Any, file: SourceFile) -> str | None:
    """The first column of the source that is not among `names`, or None."""
    wanted = (file.source.column, *file.source.group_by)
    return next((name for name in wanted if name not in names), None)


def _no_column(name: str, names: Any, file: SourceFile, place: str) -> dict[str, Any]:
    field = "column" if name == file.source.column else "group_by"
    return {
        "what": f"corpus file {file.name}{place} has no column {name!r}",
        "expected": f"one of {', '.join(map(str, names)) or '(it has none)'}",
        "got": repr(name),
        "fix": f"Set corpus.sources[].{field} to a column that is there",
    }


def _text(value: Any, file: SourceFile, place: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise not_utf8(file, place, error.start, error, row=place) from error
    if not isinstance(value, str):
        expected, got = "text in the column", type(value).__name__
        raise bad_record(file, place, "not text", expected=expected, got=got)
    # JSON may spell half of a surrogate pair, which Python takes and UTF-8, hence every digest, cannot write.
    try:
        value.encode()
    except UnicodeEncodeError as error:
        got = f"a lone surrogate at character {error.start}"
        raise bad_record(file, place, "not Unicode", expected="valid Unicode", got=got) from error
    return value


def _plain(value: Any) -> Any:
    """`value` with its type, so that values compare by content: 1 and True are equal in Python."""
    return type(value).__name__, value
