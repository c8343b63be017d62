"""BatchTopK's selection over shards and ranks against that of one process, ranks as threads."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.meeting import meet
from winnow.sae.codes import best_of_groups
from winnow.sae.model import Sae
from winnow.schemas.training import SaeParts
from winnow.trainer.kernels.best import best, sort_pairs
from winnow.trainer.kernels.step_ops import step_ops
from winnow.trainer.mesh.edge import digits, nth_best, order_bits
from winnow.trainer.mesh.shard import Shard
from winnow.trainer.mesh.topk import Codes
from winnow.trainer.mesh.world import World
from winnow.trainer.run.threshold import calibrate
from winnow.trainer.step.selection import Candidates, JoinedGroups, best_of_batch, groups_of


def sharded_best(
    z: torch.Tensor, k: int, groups: tuple[int, ...], width: int, world: World, groups_of=groups_of
) -> torch.Tensor:
    """This rank's part [b, n] of what it takes of pre-activations z [B, N]; encodes with unit matrices."""
    count, place = len(groups), world.data.rank
    share = slice(place * len(z) // world.data.size, (place + 1) * len(z) // world.data.size)
    part = world.part(z.shape[1])
    own = z[share, part.start : part.stop]
    sizes = (len(own),) if count < world.data.size else groups[: count // world.data.size]
    together = groups_of(sizes, k, count, world, z.device)
    # rows one-hot, so that W_enc x is the row of z at hand
    rows, W_enc = torch.eye(len(own), dtype=z.dtype), own.T.contiguous()
    # not `topk` of torch, which may take any of the equals at the end of a row
    found = sort_pairs(*best(own, min(width, len(part))))
    b_enc = W_enc.new_zeros(len(part))
    layer = Candidates(Codes(*found), rows, W_enc, b_enc)
    (codes,), _ = best_of_batch(step_ops("cpu"), [layer], together)
    return torch.zeros_like(own).scatter_add_(1, codes.indices, codes.values)


@settings(max_examples=40)
@example(629, (1, 3), 2, 1, 1)
@given(
    st.integers(0, 10**6),
    st.sampled_from([(1, 1), (1, 3), (2, 2), (4, 1), (2, 1)]),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 7),
    st.sampled_from([1, 3, 1000]),
)
def test_any_mesh_takes_what_one_process_takes_ties_included(seed, mesh, count, k, levels):
    draw = torch.Generator().manual_seed(seed)
    z = torch.randint(-levels, levels + 1, (16, 23), generator=draw).double()
    z[::5] *= 3
    expected = best_of_groups(z, k, [16 // count] * count)
    data, latent = mesh
    found = meet(data, latent, partial(sharded_best, z, k, (16 // count,) * count, 2))
    assert torch.equal(torch.cat([torch.cat(row, dim=1) for row in found]), expected)


def test_groups_at_hand_are_selected_as_those_that_are_shared():
    z = torch.randint(-3, 4, (16, 23), generator=torch.Generator().manual_seed(4)).double()
    found = [sharded_best(z, 3, (4,) * 4, 2, World(), of) for of in (groups_of, JoinedGroups.of)]
    assert torch.equal(*found)


def test_nan_is_taken_first():
    z = torch.rand(8, 20, generator=torch.Generator().manual_seed(1))
    z[3, 7] = torch.nan
    found = meet(1, 2, partial(sharded_best, z, 2, (8,), 20))
    assert torch.cat(found[0], dim=1)[3, 7].isnan()


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_bits_stand_in_the_order_of_the_numbers(kind):
    largest = torch.finfo(kind).max
    values = torch.tensor([0.0, 1e-40, 0.1, 1.0, 1.0000001, largest, torch.inf, torch.nan], dtype=kind)
    assert (order_bits(values).diff() >= 0).all()
    assert sum(size for _, size in digits(kind)) == torch.finfo(kind).bits - 1
    assert len(digits(kind)) == {torch.float32: 3, torch.float64: 6}[kind]


@pytest.mark.parametrize("shards", [1, 3])
def test_the_nth_best_over_the_shards(shards):
    values = torch.rand(5, 30, generator=torch.Generator().manual_seed(2)).sub_(0.2).relu_()
    expected = values.flatten().sort(descending=True).values
    for rank in (1, 50, 150):

        def work(world: World, rank: int = rank) -> float:
            part = world.part(30)
            return nth_best(values[:, part.start : part.stop], rank, world.latent).item()

        assert {n for row in meet(1, shards, work) for n in row} == {expected[rank - 1].item()}


def test_the_threshold_is_that_of_a_plain_sort():
    sae = Sae(6, 40, 3, "none", SaeParts(activation="batchtopk"))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(40, 6, generator=draw))
    rows = torch.randn(200, 6, generator=draw)
    rows[0] *= 100  # has more than the first candidates
    values = (rows @ sae.W_enc.T).relu().flatten().sort(descending=True).values
    assert calibrate(Shard.alone(sae), [(rows, torch.ones(200))]) == pytest.approx(
        values[599:601].mean().item()
    )
