"""A step's rows reach the device in order, one batch ahead where that is wanted, and fail in their turn."""

from __future__ import annotations

import pytest
import torch

from winnow.schemas.errors import IntegrityError
from winnow.store.read.torch_stream import Batch
from winnow.trainer.run.transfer import PART_BYTES, Transfer, parts_of

CPU = torch.device("cpu")


class Source:
    """Batches whose every number is their step; the one of step `bad` cannot be read."""

    def __init__(self, hooks=("h.1",), bad=None):
        self.hooks, self.bad, self.taken = hooks, bad, 0

    def __iter__(self):
        return self

    def __next__(self):
        step, self.taken = self.taken, self.taken + 1
        if step == self.bad:
            raise IntegrityError("a shard", expected="its digest", got="another")
        rows = {hook: torch.full((6, 3 + n), float(step)) for n, hook in enumerate(self.hooks)}
        return Batch(rows, torch.arange(6.0) + step, step)


@pytest.mark.parametrize("ahead", [False, True])
def test_batches_come_in_order_and_no_more_are_taken_than_wanted(ahead):
    source = Source()
    with Transfer(source, 5, CPU, ahead=ahead) as batches:
        for step, (rows, weights, number) in enumerate(batches):
            assert source.taken == min(5, step + 1 + ahead)
            assert torch.equal(rows["h.1"], torch.full((6, 3), float(step)))
            assert torch.equal(weights, torch.arange(6.0) + step)
            assert number == step
    assert source.taken == 5


@pytest.mark.parametrize("ahead", [False, True])
def test_what_cannot_be_read_fails_in_its_turn(ahead):
    with Transfer(Source(bad=2), 5, CPU, ahead=ahead) as batches:
        assert [float(next(batches).rows["h.1"][0, 0]) for _ in range(2)] == [0, 1]
        with pytest.raises(IntegrityError, match="its digest"):
            next(batches)


@pytest.mark.parametrize("whole", [False, True])
def test_every_hook_s_rows_arrive(whole):
    with Transfer(Source(("h.1", "h.2")), 1, CPU, whole=whole, ahead=True) as batches:
        rows, _, _ = next(batches)
    assert {hook: tuple(t.shape) for hook, t in rows.items()} == {"h.1": (6, 3), "h.2": (6, 4)}


@pytest.mark.parametrize(("rows", "width"), [(0, 3), (1, 3), (4096, 1024), (5, PART_BYTES)])
def test_rows_are_pinned_in_parts_that_cover_them(rows, width):
    tensor = torch.empty(rows, width, dtype=torch.bfloat16)
    parts = parts_of(tensor)
    assert [number for part in parts for number in range(part.start, part.stop)] == list(range(rows))
    assert all(tensor[part].nbytes <= max(PART_BYTES, 2 * width) for part in parts)
