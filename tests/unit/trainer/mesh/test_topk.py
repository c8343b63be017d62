"""The global top-k against a stable sort of everything, shards as threads."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.meeting import meet
from winnow.trainer.mesh.topk import candidates, count_kept, keep
from winnow.trainer.mesh.world import World


def select(shards: list[torch.Tensor], k: int) -> tuple[list[torch.Tensor], int, int]:
    """Each shard's counts, rows of the second round, and rounds, for pre-activations [B, n] of each."""
    available = [min(k, shard.shape[1]) for shard in shards]

    def work(world: World):
        rank = world.latent.rank
        best = shards[rank].sort(dim=1, descending=True, stable=True).values[:, : available[rank]]
        return count_kept(best, k, available, world.latent), world.latent.gathers

    (found,) = meet(1, len(shards), work)
    assert len({(counts.second_rounds, gathers) for counts, gathers in found}) == 1
    return [counts.kept for counts, _ in found], found[0][0].second_rounds, found[0][1]


def expected(shards: list[torch.Tensor], k: int) -> list[torch.Tensor]:
    whole = torch.cat(shards, 1)
    chosen = whole.sort(dim=1, descending=True, stable=True).indices[:, :k]
    edges = torch.tensor([0, *[shard.shape[1] for shard in shards]]).cumsum(0)
    return [((chosen >= first) & (chosen < last)).sum(1) for first, last in pairwise(edges.tolist())]


@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(1, 40), st.sampled_from([2, 9, 1000]))
def test_counts_are_those_of_a_stable_sort_of_everything(seed, size, k, levels):
    draw = torch.Generator().manual_seed(seed)
    widths = torch.randint(1, 60, (size,), generator=draw).tolist()
    k = min(k, sum(widths))
    shards = [torch.randint(-levels, levels, (7, width), generator=draw).double() for width in widths]
    kept, _, _ = select(shards, k)
    for found, right in zip(kept, expected(shards, k), strict=True):
        assert torch.equal(found, right)


def test_one_round_settles_what_is_spread_and_two_what_is_not():
    draw = torch.Generator().manual_seed(0)
    spread = [torch.rand(64, 256, generator=draw) for _ in range(4)]
    assert candidates(32, 4) == 20
    kept, second, gathers = select(spread, 32)
    assert (second, gathers) == (0, 1)
    skewed = [spread[0] + 5, *spread[1:]]
    kept, second, gathers = select(skewed, 32)
    assert (second, gathers) == (64, 2)
    assert torch.equal(kept[0], torch.full((64,), 32))


def test_nan_is_not_lost():
    shards = [torch.rand(3, 30, dtype=torch.float64) for _ in range(3)]
    shards[2][1, 4] = torch.nan
    kept, _, _ = select(shards, 8)
    assert kept[2][1] >= 1


@pytest.mark.parametrize("count", [0, 2, 4])
def test_slots_beyond_the_count_and_negatives_are_0(count):
    values = torch.tensor([[3.0, 2.0, 1.0, -1.0]])
    codes = keep(values, torch.arange(4)[None], torch.tensor([count]))
    assert codes.values.tolist() == [[3.0, 2.0, 1.0, 0.0][: max(1, count)] if count else [0.0]]
    assert codes.indices.shape == codes.values.shape
