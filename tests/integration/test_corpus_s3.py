"""A corpus in object storage, read through s3fs with the usual environment."""

import gzip

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from winnow.harvester.plan.corpus import documents
from winnow.harvester.plan.planner import make_plan
from winnow.harvester.plan.sources import find_files
from winnow.harvester.plan.tally import Tally
from winnow.schemas.base import validate
from winnow.schemas.config import Config
from winnow.schemas.corpus import CorpusSpec
from winnow.schemas.errors import ConfigError, StoreError
from winnow.store.objects import open_store
from winnow.subject.testing import byte_subject


@pytest.fixture
def bucket(s3_uri):
    s3fs.S3FileSystem.clear_instance_cache()
    yield s3_uri
    s3fs.S3FileSystem.clear_instance_cache()


def spec(uri: str) -> CorpusSpec:
    return CorpusSpec.model_validate({"sources": [{"uri": uri}]})


def test_every_format_from_s3(bucket):
    storage = fsspec.filesystem("s3")
    storage.pipe_file(f"{bucket}/text/a.txt", b"hello\r\nworld")
    storage.pipe_file(f"{bucket}/text/b.jsonl.gz", gzip.compress(b'{"text": "x"}\n{"text": "y"}'))
    with storage.open(f"{bucket}/text/c.parquet", "wb") as file:
        pq.write_table(pa.table({"text": ["p", "q"]}), file)
    tally = Tally()
    assert list(documents(spec(f"{bucket}/text/*"), tally)) == ["hello\nworld", "x", "y", "p", "q"]
    assert tally.bytes_done == sum(file.size or 0 for file in find_files(spec(f"{bucket}/text/*")))
    storage.pipe_file(f"{bucket}/text/d.txt", b"caf\xe9")
    with pytest.raises(ConfigError, match=r"s3://.*d\.txt is not UTF-8 at byte 3"):
        list(documents(spec(f"{bucket}/text/*")))


def test_keys_are_found_by_their_names(bucket):
    storage = fsspec.filesystem("s3")
    names = ["part[1].txt", "a b.txt", "ä.txt", "a%20b.txt", "a#b.txt", "a?b.txt", "date=1.txt", "a::b.txt"]
    for name in ("part1.txt", "axb.txt", "a", *names):
        storage.pipe_file(f"{bucket}/odd/{name}", name.encode())
    assert [list(documents(spec(f"{bucket}/odd/{name}"))) for name in names] == [[name] for name in names]
    storage.pipe_file(f"{bucket}/run[1]/a.txt", b"a")
    assert list(documents(spec(f"{bucket}/run[1]/*.txt"))) == ["a"]


def test_complaints(bucket, monkeypatch):
    with pytest.raises(ConfigError, match="matches nothing"):
        find_files(spec(f"{bucket}/absent/*.txt"))
    fsspec.filesystem("s3").pipe_file(f"{bucket}/text/a.txt", b"hello")
    with pytest.raises(ConfigError, match=r"Give a pattern"):
        find_files(spec(f"{bucket}/text"))
    with monkeypatch.context() as patched:
        patched.setenv("AWS_ENDPOINT_URL", "http://192.0.2.1:9000")
        with pytest.raises(ConfigError, match=r"plain http:// to 192.0.2.1.*storage.allow_http"):
            find_files(spec(f"{bucket}/text/*"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreError, match="Check the address and the credentials"):
        find_files(spec(f"{bucket}/text/*"))


def test_a_plan_from_s3_to_s3(bucket):
    text = "".join(f'{{"text": "document {n} of the corpus"}}\n' for n in range(300))
    fsspec.filesystem("s3").pipe_file(f"{bucket}/text/a.jsonl", text.encode())
    raw = {
        "root": f"{bucket}/root",
        "subject": {"model": "testing/tokenizer-only"},
        "corpus": {"sources": [{"uri": f"{bucket}/text/*.jsonl"}]},
        "plan": {"hooks": ["resid_post.1"], "context_length": 16, "windows_per_unit": 64},
    }
    config = validate(Config, raw, origin="test")
    plan = make_plan(config, open_store(config.root), subject=byte_subject())
    again = make_plan(config, open_store(config.root), subject=byte_subject())
    assert plan == again
    assert plan.corpus_facts.documents == 300
