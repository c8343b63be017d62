"""One read for all shards of a data rank, ranks as threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.meeting import meet
from winnow.schemas.errors import IntegrityError, WorkerError
from winnow.store.read.torch_stream import Batch
from winnow.trainer.mesh.rows import SharedRows
from winnow.trainer.mesh.world import World

B, D, STEPS = 4, 3, 5


class Rows:
    """A stream that fails at a step, and is not ready at first."""

    memory_bytes, bytes_read = 7, 11

    def __init__(self, fails_at: int | None = None) -> None:
        self.step, self.fails_at, self.looks, self.closed = 0, fails_at, 0, False

    def ready(self, seconds: float) -> bool:
        del seconds
        self.looks += 1
        return self.looks > 3

    def __next__(self) -> Batch:
        if self.step == self.fails_at:
            raise IntegrityError("slice 7 is damaged")
        self.step += 1
        draw = torch.Generator().manual_seed(self.step)
        weights = torch.tensor([1.0, 0.0, 1.0, 1.0])
        return Batch({"h": torch.randn(B, D, generator=draw)}, weights, self.step - 1)

    def close(self) -> None:
        self.closed = True


def go(stream: Rows, work, follow: bool = False) -> tuple[list[Any], int]:
    """`work(rows)` on three shards, what each gave or raised; and how often they waited."""
    waits: list[int] = []

    def run(world: World) -> Any:
        rank, opened = world.latent.rank, []

        def open_stream() -> Any:
            opened.append(rank)
            return stream

        idle = (lambda: waits.append(rank)) if follow else None
        with SharedRows(
            open_stream, {"h": torch.empty(0, D)}, B, 0, torch.device("cpu"), world, idle
        ) as rows:
            return work(rows), rows.bytes_read, rows.memory_bytes, opened

    return meet(1, 3, run)[0], len(waits)


def test_every_shard_has_the_rows_that_one_of_them_read():
    def work(rows: SharedRows) -> list[Batch]:
        first = rows.peek(2)
        batches = [next(rows) for _ in range(STEPS)]
        assert all(torch.equal(a.rows["h"], b.rows["h"]) for a, b in zip(first, batches, strict=False))
        return batches

    stream, right = Rows(), Rows()
    expected = [next(right) for _ in range(STEPS)]
    found, waits = go(stream, work)
    assert waits == stream.looks == 0, "what is not followed is not waited for"
    for rank, (batches, read, held, opened) in enumerate(found):
        assert (read, held, opened) == ((11, 7, [0]) if rank == 0 else (0, 0, []))
        for batch, one in zip(batches, expected, strict=True):
            assert torch.equal(batch.rows["h"], one.rows["h"])
            assert torch.equal(batch.weights, one.weights)
            assert batch.step == one.step
    assert stream.closed


def test_all_of_them_wait_for_a_harvest():
    _, waits = go(Rows(), next, follow=True)
    assert waits == 3 * 3, "three looks in vain, on three ranks"


def test_rows_that_the_reader_cannot_read_stop_all_of_them_with_the_cause():
    found, _ = go(Rows(fails_at=1), lambda rows: [next(rows), next(rows)])
    assert isinstance(found[0], IntegrityError)
    for error in found[1:]:
        with pytest.raises(WorkerError, match=r"rank 0 of the mesh failed.*slice 7"):
            raise error
