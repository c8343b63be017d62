"""Training in less than float32: products in bfloat16, Adam's moments in bfloat16 and int8."""

from __future__ import annotations

import pytest
import torch

from tests.support.planted import ACTIVE, D_MODEL, directions
from winnow.sae.init import initialise
from winnow.sae.metrics import Fvu
from winnow.sae.model import Sae
from winnow.schemas.training import TrainSpec
from winnow.trainer.kernels import encode_topk, reference
from winnow.trainer.kernels.step_ops import step_ops
from winnow.trainer.run.checkpoint import pack, unpack
from winnow.trainer.step import Recipe, Run, train_step
from winnow.trainer.step.moments import new_state, pack_moments, to_bfloat16, unpack_moments

B, N, STEPS = 256, 64, 150


def planted(seed: int, count: int = B) -> torch.Tensor:
    """Rows [count, 32] of 3 known directions each and a little noise."""
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.rand(count, len(directions()), generator=draw).topk(ACTIVE, dim=1).indices
    weights = 1 + torch.rand(count, ACTIVE, generator=draw)
    rows = (weights[..., None] * torch.from_numpy(directions())[chosen]).sum(1)
    return rows + 0.01 * torch.randn(rows.shape, generator=draw)


def make(**fields) -> Run:
    base = {"out": "x", "hook": "h.1", "latents": N, "k": ACTIVE, "batch_rows": B, "epochs": 1}
    base |= {"dead_after_tokens": 2000, "lr": 0.006, "kernels": "cpu"}
    spec = TrainSpec.model_validate(base | fields)
    sae = Sae(D_MODEL, N, spec.k)
    constant = initialise(sae, planted(10**6, 1000), torch.ones(1000), seed=0)
    return Run(sae, Recipe.resolve(spec, D_MODEL, steps_per_epoch=STEPS), constant)


def go(run: Run, until: int = STEPS) -> Run:
    while run.counts.step < until:
        train_step(run, planted(run.counts.step), torch.ones(B))
    return run


def fvu(run: Run) -> float:
    """Of rows that were not trained on, by the weights as they are."""
    found, x = Fvu(D_MODEL), planted(10**7, 2000)
    found.add(x, run.sae(x).detach())
    return found.value


@pytest.fixture(scope="module")
def whole() -> float:
    """The FVU that float32 ends with."""
    found = fvu(go(make()))
    assert found < 0.25  # it has learned something
    return found


def test_bfloat16_products_end_as_float32_does(whole):
    run = go(make(compute_dtype="bfloat16"))
    assert fvu(run) == pytest.approx(whole, rel=0.05)
    assert run.counts.auxk_steps > 5
    kinds = {tensor.dtype for name, tensor in pack(run).items() if name.startswith(("sae", "adam", "ema"))}
    assert kinds == {torch.float32, torch.int64}  # the masters; and the average's number of steps


def test_the_cpu_rounds_operands_and_sums_in_float32():
    draw = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(*size, generator=draw) for size in ((40, 24), (300, 24), (300,)))
    ops = step_ops("cpu", "bfloat16")
    values, indices, _ = ops.encode(ops.low(x), ops.low(W), b, 5, None)
    expected = reference.encode_topk(x.bfloat16(), W.bfloat16(), b, 5)
    torch.testing.assert_close(values, expected[0])
    assert torch.equal(indices, expected[1])
    assert not torch.equal(indices, encode_topk(x, W, b, 5, "cpu")[1])  # it does round
    exact = x.bfloat16().double() @ W.bfloat16().double().T
    torch.testing.assert_close(ops.mm(x, W.T), exact.float(), rtol=1e-5, atol=1e-5)
    assert step_ops("cpu").low(x) is x


@pytest.mark.parametrize(("moments", "tolerance"), [("bfloat16", 0.05), ("int8", 0.10)])
def test_packed_moments_end_as_float32_does(whole, moments, tolerance):
    run = go(make(moments=moments))
    assert fvu(run) == pytest.approx(whole, rel=tolerance)


def test_rounding_at_random_keeps_the_mean_and_goes_to_neighbours():
    values = torch.tensor([1.0, -1.001, 3e-9, -7.77e5, 0.0]).repeat(20_000, 1)
    found = to_bfloat16(values, torch.Generator().manual_seed(1)).float()
    assert torch.equal(found[:, [0, 4]], values[:, [0, 4]])  # these it has
    step = values[0].abs() * 2**-7
    assert ((found - values).abs() <= step).all()
    assert all(len(found[:, column].unique()) == 2 for column in (1, 2, 3))
    torch.testing.assert_close(found.double().mean(0), values[0].double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_moments_come_back_within_their_step(kind):
    draw = torch.Generator().manual_seed(2)
    parameter = torch.zeros(9, 40)
    first, second = torch.randn(9, 40, generator=draw), torch.rand(9, 40, generator=draw) ** 8
    first[3], second[3] = 0, 0  # a latent that was never active
    state, rows = new_state(parameter, kind), slice(2, 9)
    found = unpack_moments(state, rows, parameter)
    found.first.copy_(first[rows])
    found.second.copy_(second[rows])
    pack_moments(state, rows, found, draw)
    back = unpack_moments(state, rows, parameter)
    largest = [m[rows].amax(1, keepdim=True) for m in (first.abs(), second.sqrt())]
    share = {"float32": (0, 0), "bfloat16": (2**-7, 2**-7), "int8": (1 / 127, 1 / 255)}[kind]
    assert ((back.first - first[rows]).abs() <= share[0] * largest[0]).all()
    assert ((back.second.sqrt() - second[rows].sqrt()).abs() <= share[1] * largest[1] * 1.001).all()
    assert torch.equal(back.second > 0, second[rows] > 0)
    assert not state["exp_avg"][:2].any()
    size = sum(t.nbytes for name, t in state.items() if name != "step")
    assert size == {"float32": 8, "bfloat16": 4, "int8": 2}[kind] * 360 + (72 if kind == "int8" else 0)


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_a_state_that_was_packed_goes_on_with_the_same_bits(moments):
    fields = {"compute_dtype": "bfloat16", "accumulate": 2, "moments": moments}
    whole, first, second = (make(**fields) for _ in range(3))
    go(whole, 30)
    unpack(second, pack(go(first, 13)))
    end, again = pack(whole), pack(go(second, 30))
    assert end.keys() == again.keys()
    for name, tensor in end.items():
        assert torch.equal(again[name], tensor), name
