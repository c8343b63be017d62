"""Checkpoints by rows of latents: any mesh reads what any other wrote; a failed write is told."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.support.meeting import meet
from tests.support.mesh_worker import N, go
from winnow.schemas.checkpoint import CheckpointIndex
from winnow.schemas.errors import IntegrityError, StoreError
from winnow.schemas.stream import StreamState
from winnow.schemas.training import SaeIdentity
from winnow.store.objects import ObjectStore
from winnow.store.objects.local import LocalStore
from winnow.store.testing import FaultyStore
from winnow.trainer.mesh.shard import has_latents
from winnow.trainer.mesh.world import Axis, World
from winnow.trainer.run import checkpoint_files
from winnow.trainer.run.checkpoint import pack
from winnow.trainer.run.checkpoint_files import Saver, newest_checkpoint, write_checkpoint

IDENTITY = SaeIdentity(
    plan_fingerprint="0" * 64, dataset_sha256=None, subject_model="m", subject_weights_sha256="1" * 64
)
STREAM = StreamState(
    plan_fingerprint="0" * 64,
    split="train",
    hooks=("h.1",),
    algorithm="lanes.v2",
    seed=0,
    lanes=64,
    group_units=1,
    batch_rows=64,
    step=8,
)


def cut(tensors: dict[str, torch.Tensor], part: range) -> dict[str, torch.Tensor]:
    return {name: t[part.start : part.stop] if has_latents(name, t) else t for name, t in tensors.items()}


def write(out: ObjectStore, run, data: int, latent: int) -> None:
    """One checkpoint, every rank of the mesh in a thread."""
    tensors = pack(run)
    index = CheckpointIndex(
        step=8,
        spec=run.recipe.spec,
        identity=IDENTITY,
        stream=STREAM,
        files={},
        threads=1,
        device="cpu",
        tokens=1,
        created="now",
    )

    for row in meet(
        data, latent, lambda world: write_checkpoint(out, index, cut(tensors, world.part(N)), world)
    ):
        assert row == [None] * latent, row


@pytest.fixture(scope="module")
def run():
    return go("everything", None)[0]


@pytest.mark.parametrize("mesh", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_any_mesh_reads_what_any_other_wrote(run, mesh, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "LARGEST_FILE_BYTES", (1 << 16) + 7 * 1000)
    out = LocalStore(tmp_path)
    write(out, run, *mesh)
    files = list(tmp_path.glob("checkpoints/*/latents-*"))
    assert len(files) > mesh[0] * mesh[1]
    assert max(path.stat().st_size for path in files) < (1 << 16) + 7 * 1000
    tensors = pack(run)
    for shards in (1, 2, 4):
        for shard in range(shards):
            world = World(None, Axis(None, shard, shards))
            _, found = checkpoint_files._read(out, f"checkpoints/{8:012d}", world)
            expected = cut(tensors, world.part(N))
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_checkpoint_that_lacks_rows_is_damaged(run, tmp_path, caplog):
    out = LocalStore(tmp_path)
    write(out, run, 1, 3)
    path = next(tmp_path.glob("checkpoints/*/index.json"))
    index = CheckpointIndex.from_json(path.read_bytes(), origin="test")
    path.write_bytes(index.model_copy(update={"rows": index.rows[:1] + index.rows[2:]}).to_json())
    with pytest.raises(IntegrityError, match="every checkpoint"):
        newest_checkpoint(out)
    assert "latents up to" in caplog.messages[0]


@pytest.mark.parametrize("fault", ["error_before", "error_after", "lost_reply"])
def test_a_lost_reply_for_the_index_ends_no_run(run, tmp_path, caplog, fault):
    clean = FaultyStore(LocalStore(tmp_path / "clean"))
    write(clean, run, 1, 1)
    number = [name for name, _ in clean.calls].index("put_new") + 1
    out = LocalStore(tmp_path / "faulty")
    write(FaultyStore(out, {number: fault}), run, 1, 1)
    newest = newest_checkpoint(out)
    assert (newest is not None, caplog.messages) == (True, [])


class Full(LocalStore):
    """A store that takes no weights."""

    def put(self, key, data):
        if "latents" in key:
            raise StoreError("no room")
        super().put(key, data)


def test_a_save_that_fails_is_raised_by_the_next_and_leaves_no_index(run, tmp_path):
    saver = Saver(Full(tmp_path), run, IDENTITY, threads=1)
    called: list[int] = []
    saver.save(STREAM, lambda: called.append(1))
    with pytest.raises(StoreError, match="no room"):
        saver.save(STREAM, lambda: called.append(2))
    assert not called
    assert not list(tmp_path.glob("checkpoints/*/index.json"))
    run.world.close()


def test_what_is_saved_is_the_state_when_it_was_asked_for(tmp_path):
    run = go("plain", None)[0]
    gate, before = threading.Event(), pack(run)
    run.world.writer.submit(gate.wait)  # the thread is busy: nothing is written yet
    done: list[int] = []
    saver = Saver(LocalStore(tmp_path), run, IDENTITY, threads=1)
    saver.save(STREAM, lambda: done.append(1))
    with torch.no_grad():
        run.sae.W_enc.zero_()
    gate.set()
    saver.wait()
    assert done == [1]
    found = newest_checkpoint(LocalStore(tmp_path))
    assert found is not None
    assert torch.equal(found[1]["sae.W_enc"], before["sae.W_enc"])
    run.world.close()
