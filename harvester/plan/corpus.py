"""Text to documents: txt, jsonl and Parquet, streamed, so that memory is flat in the corpus's size.

What a document is:

- txt: the whole file, line ends normalised to `\\n`;
- jsonl, Parquet: a record's text exactly as stored (null is empty text), or with `group_by` the texts of
  consecutive records of one file that agree in those fields, joined with `separator`.

A record without readable text ends the plan; with `bad_records: skip` it is ignored, so that in a group the
records before and after it are joined. A record of txt is the whole file.

- tokens: a record's ids as they are; of a raw file, what ends with the joining token;
- chat: a conversation, rendered by a chat template (`winnow.harvester.plan.rendering`), never cut.

A document longer than `max_document_chars` is cut (see `cut`), and each piece is then a document of its own.
Documents of white space only are skipped. Text must be UTF-8; a byte-order mark at the start of a file is
dropped.
"""

from __future__ import annotations

import codecs
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence

from winnow.harvester.plan.chat import read_chat
from winnow.harvester.plan.ids import GivenIds, IdRules, read_ids
from winnow.harvester.plan.records import (
    CHUNK_BYTES,
    BadRecord,
    Reading,
    Record,
    has_nul,
    jsonl_records,
    not_utf8,
    parquet_records,
)
from winnow.harvester.plan.rendering import ChatTemplate, Rendered
from winnow.harvester.plan.sources import SourceFile, find_files, open_file
from winnow.harvester.plan.tally import DigestSet, Tally
from winnow.schemas.corpus import CorpusSpec
from winnow.schemas.errors import ConfigError

Document = str | Rendered | GivenIds
"""A text, a conversation as a chat template wrote it, or token ids."""


def documents(
    spec: CorpusSpec,
    tally: Tally | None = None,
    files: Sequence[SourceFile] | None = None,
    templates: Mapping[int, ChatTemplate] | None = None,
    rules: IdRules | None = None,
) -> Iterator[Document]:
    """Yield every document of the corpus, in order, without empty ones and (if asked) without duplicates.

    Args:
        spec: The corpus.
        tally: Counts and digest, updated while the iterator runs.
        files: `find_files(spec)`, if the caller has it already.
        templates: The chat template of each source of conversations (`chat_templates`).
        rules: What the ids of sources of tokens must be.

    Raises:
        ConfigError: Text that is not UTF-8, a column that is absent, a record of another kind, an empty
            corpus; with file and place.
        StoreError: A file cannot be read.
    """
    tally = tally or Tally()
    seen = DigestSet() if spec.deduplicate else None
    files = find_files(spec) if files is None else files
    for file in files:
        before = tally.bytes_done
        tally.begin_source(file.number)
        for data, document in _read(Reading(file, spec, tally), templates or {}, rules):
            # 128 bits: at 10^12 documents two texts share a digest with a probability of about 10^-15.
            if seen is not None and not seen.add(hashlib.blake2b(data, digest_size=16).digest()):
                tally.duplicates += 1
                continue
            tally.count(data, len(document))
            yield document
        # Set, not added to: readers count while they read, some of them ahead of what they have yielded.
        tally.bytes_done = before + (file.size or 0)
    if tally.documents == 0:
        raise ConfigError(
            "corpus.sources hold no text",
            expected="at least one document that is more than white space",
            got=f"none in {len(files)} file(s){_left_out(tally)}",
            fix="Check the files and the column",
        )


def _read(
    reading: Reading, templates: Mapping[int, ChatTemplate], rules: IdRules | None
) -> Iterator[tuple[bytes, Document]]:
    """Yield what a document is compared and digested by, and the document."""
    file = reading.file
    if file.source.format == "chat":
        yield from read_chat(reading, templates[file.number])
        return
    if file.source.format == "tokens":
        assert rules is not None, "a source of tokens without what its ids must be"
        yield from read_ids(reading, rules)
        return
    for text in _READERS[file.format](reading):
        if text and not text.isspace():
            yield text.encode(), text


def _left_out(tally: Tally) -> str:
    counts = ", ".join(f"{count:,} {reason}" for reason, count in tally.bad.items())
    return f"; left out: {counts}; the first is {tally.bad_first[0]}" if counts else ""


def cut(text: str, start: int, limit: int) -> int:
    """The end of the piece of `text` that begins at `start`, at most `limit` characters later.

    After the last blank line in the second half of the piece; if there is none, after the last line end; then
    after the last space; otherwise at the limit itself.
    """
    # The second half only, so that no piece is tiny.
    stop, half = start + limit, start + limit // 2
    for mark in ("\n\n", "\n", " "):
        at = text.rfind(mark, half, stop)
        if at >= 0:
            return at + len(mark)
    return stop


class _Cutter:
    """Gathers text and returns it in pieces of at most `limit` characters."""

    # Strings are joined once a limit's worth has come: adding each to a growing text is quadratic for a book
    # of many records.
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


def _read_txt(reading: Reading) -> Iterator[str]:
    # Read through once before: a long file's pieces are yielded while it is read, and cannot be taken back
    # if its last byte turns out bad.
    if reading.spec.bad_records == "skip":
        try:
            for _ in _decoded(reading.file):
                pass
        except BadRecord as error:
            reading.settle(error)
            return
    cutter, before = _Cutter(reading.spec.max_document_chars), reading.tally.bytes_done
    # Incremental, because a chunk may end between \r and \n.
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    for text, done, last in _decoded(reading.file):
        reading.tally.bytes_done = before + done
        yield from cutter.feed(newlines.decode(text, final=last))
    yield from cutter.flush()


def _decoded(file: SourceFile) -> Iterator[tuple[str, int, bool]]:
    """Yield (a piece of a txt file's text, stored bytes read so far, whether it is the last)."""
    # Incremental as well: a chunk may end inside a character, whose first bytes then wait in the decoder and
    # count into the offset of an error.
    decoder, offset = codecs.getincrementaldecoder("utf-8")("strict"), 0
    with open_file(file) as (stream, raw):
        while True:
            chunk = stream.read(CHUNK_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise not_utf8(file, "", offset - pending + error.start, error) from error
            if offset == 0:
                text = text.removeprefix("\ufeff")
            if (nul := chunk.find(0)) >= 0:
                raise has_nul(file, "", offset + nul)
            offset += len(chunk)
            yield text, raw.tell(), not chunk
            if not chunk:
                break


def _read_jsonl(reading: Reading) -> Iterator[str]:
    yield from _group(reading, jsonl_records(reading))


def _read_parquet(reading: Reading) -> Iterator[str]:
    yield from _group(reading, parquet_records(reading))


def _group(reading: Reading, records: Iterator[Record]) -> Iterator[str]:
    source, cutter, current = reading.file.source, _Cutter(reading.spec.max_document_chars), None
    for text, group in records:
        if source.group_by and group == current:
            yield from cutter.feed(source.separator)
        else:
            yield from cutter.flush()
        yield from cutter.feed(text)
        current = group
    yield from cutter.flush()


_READERS: dict[str, Callable[[Reading], Iterator[str]]] = {
    "txt": _read_txt,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}
