"""Text to documents: formats, compression, cutting, joining, dropping, and every complaint."""

import bz2
import gzip
import hashlib
import json
import lzma
from decimal import Decimal
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import winnow.harvester.plan.corpus as corpus_module
import winnow.harvester.plan.records as records_module
from winnow.common.packages import _matching
from winnow.harvester.plan.corpus import cut, documents
from winnow.harvester.plan.sources import find_files
from winnow.harvester.plan.tally import DigestSet, Tally
from winnow.schemas.corpus import CorpusSpec
from winnow.schemas.errors import ConfigError, DependencyMissing, StoreError


def corpus(*sources: dict[str, object] | str | Path, **fields: object) -> CorpusSpec:
    given = [source if isinstance(source, dict) else {"uri": str(source)} for source in sources]
    return CorpusSpec.model_validate({"sources": given, **fields})


def texts(*sources: dict[str, object] | str | Path, **fields: object) -> list[str]:
    return list(documents(corpus(*sources, **fields)))


def write_jsonl(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(params=[7, 2**20], ids=["chunks of 7 bytes", "chunks of 1 MiB"])
def chunks(request, monkeypatch):
    for module in (corpus_module, records_module):
        monkeypatch.setattr(module, "CHUNK_BYTES", request.param)


def test_patterns_are_read_in_sorted_order(tmp_path):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    (tmp_path / "folder.txt").mkdir()
    assert texts(f"{tmp_path}/*.txt") == ["a.txt", "b.txt"]
    assert texts(tmp_path / "b.txt", tmp_path.as_uri() + "/a.txt") == ["b.txt", "a.txt"]


ODD_NAMES = [
    "part[1].txt", "[x].txt", "a b.txt", "ä \U0001f980.txt", "a%20b.txt", "a#b.txt", "a?b.txt", "a*b.txt",
    "date=2026-01-01.txt", "-x.txt", "a::b.txt", "a:b.txt", "~t.txt", "$HOME.txt", "a\\b.txt", "{a}.txt",
    "!x.txt", "a\nb.txt", "end .txt",
]  # fmt: skip


@pytest.mark.parametrize("name", ODD_NAMES)
def test_whatever_a_file_is_called_it_is_found_by_its_name(tmp_path, monkeypatch, name):
    for other in (
        "part1.txt",
        "x.txt",
        "axb.txt",
        "a b.txt",
        "a",
    ):  # what the name means as a pattern or a URL
        (tmp_path / other).write_text("another")
    (tmp_path / name).write_text("this one")
    assert texts(tmp_path / name) == texts(f"file://{tmp_path / name}") == ["this one"]
    if name != "a%20b.txt":  # whose escaped form is not that of `a b.txt`
        assert texts((tmp_path / name).as_uri()) == ["this one"]
    monkeypatch.chdir(tmp_path)
    assert texts(name) == ["this one"]


def test_a_folder_named_like_a_pattern_may_stand_before_one(tmp_path):
    for folder in ("run[1]", "run1", "run2"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(folder)
    assert texts(f"{tmp_path}/run[1]/*.txt") == ["run[1]"]
    assert texts(f"{tmp_path}/run[12]/*.txt") == ["run1", "run2"]
    assert texts(f"{tmp_path}/run[[]1]/?.txt") == ["run[1]"]
    with pytest.raises(ConfigError, match="matches nothing"):
        texts(f"{tmp_path}/run[1]/b.txt")


def test_a_package_file_named_like_a_pattern_is_found_by_its_name():
    listed = [PurePosixPath(name) for name in ("d/part[1].txt", "d/part1.txt", "e/part2.txt")]
    assert _matching(listed, "part[1].txt") == _matching(listed, "d/part[1].txt") == listed[:1]
    assert _matching(listed, "part[12].txt") == listed[1:]
    assert _matching(listed, "d/*.txt") == listed[:2]


PACKERS = [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)]


@pytest.mark.parametrize(("suffix", "pack"), PACKERS)
def test_compression_follows_the_suffix(tmp_path, suffix, pack):
    packed = pack(b"one half, ") + pack(b"and the other")  # two members in one file
    (tmp_path / f"a.txt.{suffix}").write_bytes(packed)
    assert texts(f"{tmp_path}/*") == ["one half, and the other"]
    (tmp_path / f"a.txt.{suffix}").write_bytes(packed[:-9])
    with pytest.raises(ConfigError, match=rf"a\.txt\.{suffix} is damaged"):
        texts(f"{tmp_path}/*")


@pytest.mark.parametrize(("suffix", "pack"), PACKERS)
@pytest.mark.parametrize("after", [b"junk that begins no stream", b"BZh9 and no more"])
def test_what_follows_a_compressed_stream_is_another_or_an_error(tmp_path, suffix, pack, after):
    (tmp_path / f"a.txt.{suffix}").write_bytes(pack(b"one half") + after + pack(b"and the other"))
    with pytest.raises(ConfigError, match=rf"a\.txt\.{suffix} is damaged"):
        texts(f"{tmp_path}/*")


@pytest.mark.parametrize(("suffix", "pack"), PACKERS)
@pytest.mark.parametrize("content", [b"", b"text that was never packed"])
def test_a_file_that_is_no_compressed_stream_is_damaged(tmp_path, suffix, pack, content):
    del pack
    (tmp_path / "b.txt").write_text("another file")
    (tmp_path / f"a.txt.{suffix}").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"a\.txt\.{suffix} is damaged: expected a whole"):
        texts(f"{tmp_path}/*")


def test_padding_between_xz_streams_and_much_text_in_few_bytes(tmp_path):
    much = b"again " * 2**20
    for suffix, pack, padding in (("xz", lzma.compress, bytes(8)), ("bz2", bz2.compress, b"")):
        path = tmp_path / f"a.txt.{suffix}"
        path.write_bytes(pack(much) + padding + pack(b"the end") + padding)
        assert "".join(texts(path, deduplicate=False)) == much.decode() + "the end"


def test_zstd(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    text = b"".join(hashlib.sha256(bytes([at % 256])).hexdigest().encode() for at in range(20_000))
    packed = zstandard.compress(text) + zstandard.compress(b" the end")
    (tmp_path / "a.txt.zst").write_bytes(packed)
    assert "".join(texts(f"{tmp_path}/*", deduplicate=False)) == text.decode() + " the end"
    for cut_at in (-3, -20, 100, 3):
        (tmp_path / "a.txt.zst").write_bytes(packed[:cut_at])
        with pytest.raises(ConfigError, match="damaged"):
            texts(f"{tmp_path}/*")


def test_zstd_absent_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    (tmp_path / "a.txt.zst").write_bytes(b"any")
    with pytest.raises(DependencyMissing, match=r"winnow-sae\[zstd\]"):
        texts(f"{tmp_path}/*")


@pytest.mark.usefixtures("chunks")
def test_txt_line_ends_and_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffcafé\r\nsix \U0001f980\r\n\rend\r".encode())
    assert texts(tmp_path / "a.txt") == ["café\nsix \U0001f980\n\nend\n"]


@pytest.mark.usefixtures("chunks")
def test_long_text_is_cut_without_loss(tmp_path):
    paragraphs = [f"Paragraph {n} " + "goes on and on " * (n % 9) + "\nuntil here." for n in range(300)]
    text = "\n\n".join(paragraphs)
    (tmp_path / "a.txt").write_text(text)
    pieces = texts(tmp_path / "a.txt", max_document_chars=400, deduplicate=False)
    assert "".join(pieces) == text
    assert all(len(piece) <= 400 for piece in pieces)
    assert all(piece.endswith("\n\n") for piece in pieces[:-1])
    record = write_jsonl(tmp_path / "a.jsonl", [{"text": text}])
    assert texts(record, max_document_chars=400, deduplicate=False) == pieces


@given(st.text("ab \n", min_size=30, max_size=300), st.integers(2, 20))
def test_cut(text, limit):
    if len(text) <= limit:
        return
    stop = cut(text, 0, limit)
    assert 0 < stop <= limit
    second_half = text[limit // 2 : limit]
    marks = [mark for mark in ("\n\n", "\n", " ") if mark in second_half]
    assert text[:stop].endswith(marks[0]) if marks else stop == limit


def test_jsonl_records(tmp_path):
    records = [{"text": "one\r\n", "n": 1}, {"text": ""}, {"text": None}, "a string", {"text": " \n"}]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n") + b'{"text": "last"}')
    assert texts(path) == ["one\r\n", "a string", "last"]


def test_jsonl_groups(tmp_path):
    verses = [("Gen", 1, "a"), ("Gen", 1, "b"), ("Gen", 2, "c"), ("Ex", 2, "d"), ("Gen", 1, "e")]
    records = [{"book": book, "chapter": chapter, "verse": text} for book, chapter, text in verses]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\n\n", 1))  # a blank line parts nothing
    source = {"uri": str(path), "column": "verse", "group_by": ["book", "chapter"]}
    assert texts(source) == ["a\nb", "c", "d", "e"]
    assert texts({**source, "separator": " / ", "group_by": ["book"]}) == ["a / b / c", "d", "e"]


def test_a_group_of_any_size_is_cut(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"k": 0, "text": f"line {n:04d}"} for n in range(1000)])
    pieces = texts({"uri": str(path), "group_by": ["k"]}, max_document_chars=200)
    assert "".join(pieces) == "\n".join(f"line {n:04d}" for n in range(1000))
    assert all(piece.endswith("\n") and len(piece) <= 200 for piece in pieces[:-1])


def test_parquet(tmp_path):
    rows = [f"document {n}" for n in range(150)]
    table = pa.table({"id": range(150), "body": rows, "kind": ["x"] * 100 + ["y"] * 50})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=40)
    source = {"uri": f"{tmp_path}/*.parquet", "column": "body"}
    assert texts(source) == rows
    assert texts({**source, "group_by": ["kind"]}) == ["\n".join(rows[:100]), "\n".join(rows[100:])]
    coded = table.set_column(1, "body", table["body"].dictionary_encode())
    pq.write_table(coded, tmp_path / "a.parquet")
    assert texts(source) == rows


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view(),
        pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.binary()), pa.json_(),
    ],
    ids=str,
)  # fmt: skip
def test_parquet_text_of_every_type(tmp_path, kind):
    plain = pa.array(["one", None, "zwölf", "one"])
    if pa.types.is_dictionary(kind):
        column = plain.cast(kind.value_type).dictionary_encode().cast(kind)
    else:
        column = plain.cast(kind)
    table = pa.table({"text": column, "part": pa.array([0, 0, 1, 1])})
    pq.write_table(table, tmp_path / "a.parquet")
    assert str(pq.read_schema(tmp_path / "a.parquet").field("text").type) == str(kind)
    assert texts(tmp_path / "a.parquet", deduplicate=False) == ["one", "zwölf", "one"]
    source = {"uri": str(tmp_path / "a.parquet"), "group_by": ["part"]}
    assert texts(source, deduplicate=False) == ["one\n", "zwölf\none"]


@pytest.mark.parametrize(
    "values",
    [
        pa.array([1234567891, 1234567891, 1234567892], pa.timestamp("ns")),
        pa.array([1234567891, 1234567891, 1234567892], pa.duration("ns")),
        pa.array([1, 1, 3], pa.time64("ns")),
        pa.array([2**62, 2**62, 5], pa.timestamp("us", "Nowhere/Zone")),
        pa.array([2**30, 2**30, 1], pa.date32()),
        pa.array([{"a": [1, None]}, {"a": [1, None]}, {"a": [1]}]),
        pa.array([[("a", 1)], [("a", 1)], None], pa.map_(pa.string(), pa.int32())),
        pa.array([b"\xff", b"\xff", b"\xfe"]),
        pa.array(["x", "x", None], pa.string_view()),
        pa.array(["x", "x", "y"]).dictionary_encode(),
        pa.array([Decimal("1.10"), Decimal("1.10"), None]),
    ],
    ids=lambda values: str(values.type),
)
def test_parquet_groups_by_columns_of_any_type(tmp_path, values):
    table = pa.table({"text": ["a", "b", "c"], "part": values})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    assert texts({"uri": str(tmp_path / "a.parquet"), "group_by": ["part"]}) == ["a\nb", "c"]


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "brotli", "lz4", "zstd"])
def test_parquet_of_every_codec_and_with_empty_row_groups(tmp_path, codec):
    table = pa.table({"text": ["one", "two"]})
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema, compression=codec) as writer:
        for part in (table[:0], table, table[:0]):
            writer.write_table(part)
    pq.write_table(table[:0], tmp_path / "b.parquet")
    assert texts(f"{tmp_path}/*.parquet") == ["one", "two"]


def test_duplicates_are_dropped_and_counted(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two", "one", "one", "three"])
    tally = Tally()
    assert list(documents(corpus(path), tally)) == ["one", "two", "three"]
    assert (tally.documents, tally.duplicates, tally.characters) == (3, 2, 11)
    assert tally.bytes_done == path.stat().st_size
    assert texts(path, deduplicate=False) == ["one", "two", "one", "one", "three"]


def test_the_digest_is_over_lengths_and_texts(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["café", "", "x", "x"])
    tally = Tally()
    list(documents(corpus(path), tally))
    stream = (5).to_bytes(8, "little") + "café".encode() + (1).to_bytes(8, "little") + b"x"
    assert tally.sha256() == hashlib.sha256(stream).hexdigest()


@given(st.lists(st.integers(0, 3000), max_size=400))
def test_digest_set_is_a_set(numbers):
    ours, theirs = DigestSet(), set[int]()
    for number in numbers:
        digest = hashlib.blake2b(str(number).encode(), digest_size=16).digest()
        assert ours.add(digest) == (number not in theirs)
        theirs.add(number)


def test_digest_set_grows(tmp_path):
    digests = [hashlib.blake2b(str(n).encode(), digest_size=16).digest() for n in range(30_000)]
    held = DigestSet()
    assert all(held.add(digest) for digest in digests)
    assert not any(held.add(digest) for digest in digests)
    assert held.bytes <= 64 * len(digests)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize(
    ("before", "bad"), [("", b"\xff\xfeh\x00"), ("some café first, ", b"\xe9t\xe9"), ("cut ", b"\xf0\x9f")]
)
def test_not_utf8_names_file_and_byte(tmp_path, name, before, bad):
    data = b'"fine"\n' + before.encode() + bad
    (tmp_path / name).write_bytes(data)
    offset = len(data) - len(bad)
    with pytest.raises(ConfigError, match=rf"{name} is not UTF-8 at byte {offset}\b"):
        texts(tmp_path / name)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("[1]", r"line 2.*a JSON object or string.*list"),
        ("{", r"line 2.*one JSON value per line"),
        ("[" * 100_000, r"line 2.*one JSON value per line"),
        ('{"txt": "x", "url": 1}', r"line 2.*no column 'text'.*txt, url"),
        ('{"text": 3}', r"line 2.*text in the column.*int"),
        ('"\\ud800"', r"line 2.*surrogate"),
        ('{"text": "a", "text": "b"}', r"line 2: expected every key of an object once, got 'text' twice"),
        ('{"text": "a", "meta": [{"k": 1, "k": 1}]}', r"line 2.*got 'k' twice"),
        ('{"text": NaN}', r"line 2.*text in the column.*float"),
        ('"one"\r"two"', r"line 2.*each ending with a line feed, got carriage returns alone"),
        ('\ufeff"a file appended"', r"line 2.*one JSON value per line.*BOM"),
    ],
)
def test_a_bad_record_is_named(tmp_path, line, complaint):
    (tmp_path / "a.jsonl").write_text('"fine"\n' + line)
    with pytest.raises(ConfigError, match=complaint):
        texts(tmp_path / "a.jsonl")


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize(("name", "text"), [("a.txt", "Привет, мир"), ("a.jsonl", '{"text": "hi"}\n')])
def test_utf16_and_utf32_without_a_mark_are_refused(tmp_path, encoding, name, text):
    # Both are valid UTF-8, full of control characters.
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(
        ConfigError, match=r"is not text: expected UTF-8, got a NUL at byte \d+, as in UTF-16"
    ):
        texts(tmp_path / name)
    (tmp_path / "b.txt").write_text("fine")
    tally = Tally()
    left = corpus(tmp_path / name, tmp_path / "b.txt", bad_records="skip")
    assert list(documents(left, tally)) == ["fine"]
    assert tally.bad.keys() == {"not text"}


def test_a_field_that_is_not_read_may_be_no_json(tmp_path):
    # Python writes NaN and Infinity, which JSON does not have.
    (tmp_path / "a.jsonl").write_text('{"text": "a", "score": NaN, "loss": -Infinity}\n"b \\u0000"')
    assert texts(tmp_path / "a.jsonl") == ["a", "b \0"]


def test_group_by_wants_objects_with_the_fields(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["text"])
    with pytest.raises(ConfigError, match=r"line 1: expected a JSON object, got a JSON str"):
        texts({"uri": str(path), "group_by": ["k"]})
    path = write_jsonl(path, [{"text": "x"}])
    with pytest.raises(ConfigError, match=r"no column 'k'.*group_by"):
        texts({"uri": str(path), "group_by": ["k"]})


def test_parquet_complaints(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1], "body": ["x"]}), path)
    with pytest.raises(ConfigError, match=r"no column 'text': expected one of id, body"):
        texts(path)
    with pytest.raises(ConfigError, match=r"column 'id': expected text, got int64"):
        texts({"uri": str(path), "column": "id"})
    pq.write_table(pa.table({"text": [["x"]]}), path)
    with pytest.raises(ConfigError, match=r"column 'text': expected text, got list<element: string>"):
        texts(path)
    pq.write_table(pa.table([["x"], ["y"]], names=["text", "text"]), path)
    with pytest.raises(ConfigError, match=r"column 'text': expected one column of that name, got 2"):
        texts(path)
    path.write_bytes(b"PARE" + bytes(20) + b"PARE")
    with pytest.raises(StoreError, match=r"a\.parquet cannot be read: got .*encrypted"):
        texts(path)
    path.write_bytes(b"no Parquet at all")
    with pytest.raises(ConfigError, match=r"a\.parquet: expected a Parquet file"):
        texts(path)


def test_parquet_text_must_be_utf8(tmp_path):
    bad = pa.array([b"fine", b"caf\xe9"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet, row 1 is not UTF-8 at byte 3"):
        texts(tmp_path / "a.parquet")


def test_an_endless_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(records_module, "MAX_RECORD_BYTES", 2**20)
    (tmp_path / "a.jsonl").write_bytes(b'"' + b"x" * 3 * 2**20 + b'"')
    with pytest.raises(ConfigError, match="line 1 is too long"):
        texts(tmp_path / "a.jsonl")


@pytest.mark.usefixtures("chunks")
def test_bad_lines_are_left_out_counted_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(records_module, "MAX_RECORD_BYTES", 2**17)
    long = b'{"text": "' + b"x" * 2**18 + b'"}'
    lines = [
        b'{"text": "one"}', b"{", b'{"text": "\xff"}', b'{"txt": "x"}', b'{"text": 3}', b'"\\ud800"', b"[1]",
        long, b'{"text": null}', b'{"text": "two"}', b"{}", b'"three"', long, b'{"text": "a", "text": "b"}',
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    tally = Tally()
    assert list(documents(corpus(tmp_path / "a.jsonl", bad_records="skip"), tally)) == ["one", "two", "three"]
    assert tally.bad == {
        "not JSON": 1,
        "not UTF-8": 1,
        "no such column": 2,
        "not text": 1,
        "not Unicode": 1,
        "no record": 1,
        "line too long": 2,
        "a key twice": 1,
    }
    assert tally.bad_first == [
        "a.jsonl, line 2: not JSON",
        "a.jsonl, line 3: not UTF-8",
        "a.jsonl, line 4: no such column",
        "a.jsonl, line 5: not text",
        "a.jsonl, line 6: not Unicode",
    ]


def test_a_line_left_out_parts_no_group(tmp_path):
    lines = ['{"k": 1, "text": "a"}', "{", '{"k": 1, "text": "b"}', '{"text": "c"}', '{"k": 2, "text": "d"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = {"uri": str(tmp_path / "a.jsonl"), "group_by": ["k"]}
    assert texts(source, bad_records="skip") == ["a\nb", "d"]


def test_bad_rows_of_parquet_are_left_out(tmp_path):
    bad = pa.array([b"fine", b"caf\xe9", None, b"last"], pa.binary())
    for column in (bad, bad.view(pa.string()), bad.cast(pa.binary_view()).view(pa.string_view())):
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
        tally = Tally()
        spec = corpus(tmp_path / "a.parquet", bad_records="skip")
        assert list(documents(spec, tally)) == ["fine", "last"]
        assert (tally.bad, tally.bad_first) == ({"not UTF-8": 1}, ["a.parquet, row 1: not UTF-8"])


@pytest.mark.usefixtures("chunks")
def test_a_txt_file_that_is_not_utf8_is_left_out_whole(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"word " * 100 + b"caf\xe9")
    (tmp_path / "b.txt").write_text("good")
    tally = Tally()
    spec = corpus(f"{tmp_path}/*.txt", bad_records="skip", max_document_chars=200)
    assert list(documents(spec, tally)) == ["good"]
    assert (tally.bad, tally.bad_first) == ({"not UTF-8": 1}, ["a.txt: not UTF-8"])


def test_what_is_no_single_record_is_refused_all_the_same(tmp_path):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="no column 'text'"):
        texts(tmp_path / "a.parquet", bad_records="skip")
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(
        ConfigError, match=r"none in 1 file\(s\); left out: 1 no such column; the first is a\.jsonl"
    ):
        texts(tmp_path / "a.jsonl", bad_records="skip")
    with pytest.raises(ConfigError, match=r"line 1 has no column.*or set corpus\.bad_records to skip"):
        texts(tmp_path / "a.jsonl")


@pytest.mark.parametrize("content", [b"", b" \r\n\t\n", b"\xef\xbb\xbf"])
def test_an_empty_corpus(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ConfigError, match="hold no text"):
        texts(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["*.txt", "absent.txt"])
def test_no_match(tmp_path, name):
    with pytest.raises(ConfigError, match="matches nothing"):
        texts(tmp_path / name)


def test_a_folder_is_refused_with_a_pattern(tmp_path):
    with pytest.raises(ConfigError, match=r"Give a pattern"):
        texts(tmp_path)


@pytest.mark.parametrize("name", ["a.pdf", "a.txt.zip", "a"])
def test_a_format_that_cannot_be_told(tmp_path, name):
    (tmp_path / name).write_text("text")
    with pytest.raises(ConfigError, match="format cannot be told"):
        texts(tmp_path / name)
    assert texts({"uri": str(tmp_path / name), "format": "txt"}) == ["text"]


def test_packed_parquet_is_refused(tmp_path):
    (tmp_path / "a.parquet.gz").write_bytes(b"")
    with pytest.raises(ConfigError, match="compresses inside"):
        texts(tmp_path / "a.parquet.gz")


def test_unknown_protocols():
    with pytest.raises(ConfigError, match="expected a path or an fsspec URI"):
        find_files(corpus("nonsense://a/b.txt"))


@pytest.mark.parametrize(
    "uri",
    [
        "s3://key:secret@bucket/a.txt",
        "https://user:word@host/a.txt",
        "https://host/a.txt?X-Amz-Credential=abc&X-Amz-Signature=def",
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_shown(uri):
    with pytest.raises(ConfigError, match="contains credentials") as caught:
        find_files(corpus(uri))
    assert "secret" not in str(caught.value)
    assert "word" not in str(caught.value)
    assert "def" not in str(caught.value)


def test_package_files_are_read():
    files = find_files(corpus("package://pytest/entry_points.txt"))
    assert [Path(file.path).name for file in files][:1] == ["entry_points.txt"]
