"""What is longer than one put takes: sent in parts, whole or not at all; create-only stays create-only."""

from __future__ import annotations

import secrets

import pytest
import torch

from tests.unit.trainer.run.test_checkpoint_files import write
from winnow.sae.model import Sae
from winnow.schemas.errors import StoreError
from winnow.store.objects import open_store
from winnow.store.objects import s3_store as s3_objects
from winnow.trainer.run import checkpoint_files
from winnow.trainer.run.checkpoint import pack
from winnow.trainer.run.checkpoint_files import newest_checkpoint
from winnow.trainer.step import Recipe, Run

MIB = 1 << 20


@pytest.fixture
def store(s3_uri, monkeypatch):
    """S3 with low limits: its parts are 5 MiB at the least, but for the last."""
    monkeypatch.setattr(s3_objects, "SINGLE_PUT_BYTES", 6 * MIB)
    monkeypatch.setattr(s3_objects, "MULTIPART_BYTES", 5 * MIB)
    return open_store(s3_uri)


def parts(store, key: str) -> int:
    """In how many parts an object was sent, which its ETag says."""
    mark = store.version(key)
    assert mark is not None
    _, _, count = mark.strip('"').partition("-")
    return int(count or 1)


@pytest.mark.parametrize(("size", "count"), [(6 * MIB, 1), (6 * MIB + 1, 2), (11 * MIB, 3)])
def test_a_long_object_goes_in_parts_and_comes_back_whole(store, size, count):
    data = secrets.token_bytes(size)
    store.put("some/weights", data)
    assert parts(store, "some/weights") == count
    assert store.get("some/weights") == data
    assert not store.put_new("some/weights", b"another"), "create-only, whatever wrote what is there"
    store.put("some/weights", data[: 7 * MIB][::-1])  # over what was there
    assert store.get("some/weights") == data[: 7 * MIB][::-1]


def test_what_must_be_created_once_goes_in_one_part_or_is_refused(store):
    with pytest.raises(StoreError, match="one part"):
        store.put_new("shard", bytes(6 * MIB + 1))
    assert store.size("shard") is None


def test_a_checkpoint_in_parts_is_read_by_another_mesh(store, monkeypatch):
    from tests.support.mesh_worker import make

    spec = make("plain").recipe.spec.model_copy(update={"latents": 2000, "k": 4, "ema": True})
    run = Run(Sae(200, 2000, 4), Recipe.resolve(spec, 200, 5), 1.0)
    with torch.no_grad():
        run.sae.W_enc.normal_(generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("tests.unit.trainer.run.test_checkpoint_files.N", 2000)
    monkeypatch.setattr(checkpoint_files, "LARGEST_FILE_BYTES", 1 << 40)
    write(store, run, 1, 1)
    (latents,) = [key for key, _ in store.list("checkpoints") if "latents" in key]
    assert parts(store, latents) > 1
    found = newest_checkpoint(store)
    assert found is not None
    expected = pack(run)
    assert found[1].keys() == expected.keys()
    assert all(torch.equal(found[1][name], tensor) for name, tensor in expected.items())
    index = f"checkpoints/{8:012d}/index.json"
    assert not store.put_new(index, b"a second commit")
    assert newest_checkpoint(store) is not None
