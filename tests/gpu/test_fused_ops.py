"""The kernels that do several parts of a step at once, against those parts one after another."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from winnow.sae.init import initialise
from winnow.sae.model import Sae
from winnow.schemas.training import MomentsDtype, TrainSpec
from winnow.trainer.kernels import decode, decode_grad_values, reconstruct, reference
from winnow.trainer.kernels.encode_topk import places_of
from winnow.trainer.kernels.fused_ops import AdamStep, Finish, fused_ops
from winnow.trainer.kernels.segment_grad import segments_of, segments_unasked
from winnow.trainer.run.checkpoint import pack, unpack
from winnow.trainer.step import Recipe, Run, sparse, train_step
from winnow.trainer.step.context import StepContext
from winnow.trainer.step.gradients import Gradients
from winnow.trainer.step.moments import new_state, unpack_moments
from winnow.trainer.step.optim import renormalise_decoder
from winnow.trainer.step.train import prepare

pytestmark = pytest.mark.gpu
KINDS = ["float32", "bfloat16", "int8"]


def normal(seed: int, *sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def directions(seed: int, *sizes: int) -> Tensor:
    return torch.nn.functional.normalize(normal(seed, *sizes), dim=1)


def codes(B: int, N: int, K: int) -> tuple[Tensor, Tensor]:
    """A hot latent 0, an idle one at the end, some values that are cut to 0."""
    indices = torch.randint(max(1, N - 1), (B, K), generator=torch.Generator().manual_seed(3))
    if K:
        indices[:, 0] = 0
    return normal(4, B, K).relu(), indices


# ---- reconstruction, error and both gradients ------------------------------------------------------

SHAPES = [(0, 5, 9, 2), (3, 4, 6, 0), (5, 3, 7, 7), (21, 33, 60, 5), (4, 130, 50, 40)]  # B, D, N, K


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reconstruction_at_once_is_its_parts(device, monkeypatch, shape, dtype):
    from winnow.trainer.kernels import reconstruct_triton

    monkeypatch.setattr(reconstruct_triton, "PROGRAMS", 2)  # several rows per program
    monkeypatch.setattr(reconstruct_triton, "TILE", 512)  # several tiles of directions per row
    B, D, N, K = shape
    values, indices = codes(B, N, K)
    given = (values, indices, normal(5, N, D).to(dtype), normal(6, B, D), normal(7, D), normal(8, B).abs())
    expected = reconstruct.reconstruct(*given)
    found = fused_ops().reconstruct(*(tensor.to(device) for tensor in given))
    for name, one, other in zip(expected._fields, found, expected, strict=True):
        assert one.dtype == other.dtype, name
        # a sum that is rounded to the neighbour moves a gradient by 2**-8 of itself
        loose = dtype == torch.bfloat16 and name in ("grad", "dz")
        largest = other.abs().max().item() if other.numel() else 1.0
        tolerance = (8e-3 if loose else 1e-5) * max(1.0, largest)
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=tolerance, msg=name)


def test_latents_may_lie_further_than_32_bits_reach(device):
    """The last direction ends 2**31 numbers and more after the first; those between are not touched."""
    D, N = 1024, (1 << 21) + 1
    W = torch.empty(N * D, dtype=torch.bfloat16, device=device).view(N, D)
    near, indices = normal(5, 2, D).to(torch.bfloat16), torch.tensor([[0, 1], [1, 0]])
    W[0], W[N - 1] = near[0], near[1]
    far, values = (indices * (N - 1)).to(device), normal(4, 2, 2).abs()
    found = decode(values.to(device), far, W, "triton").cpu()
    torch.testing.assert_close(found.float(), values.gather(1, indices) @ near.float(), rtol=0.01, atol=0.02)
    given = (normal(6, 2, D), normal(7, D), torch.ones(2))
    expected = reconstruct.reconstruct(values, indices, near, *given)
    found = fused_ops().reconstruct(values.to(device), far, W, *(tensor.to(device) for tensor in given))
    torch.testing.assert_close(found.y_hat.cpu(), expected.y_hat, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.dz.cpu(), expected.dz, rtol=0.02, atol=0.5)
    dots = decode_grad_values(found.grad, far, W, "triton").cpu()
    torch.testing.assert_close(dots.float(), found.dz.cpu(), rtol=0.02, atol=0.5)


def test_a_nan_reaches_the_loss_and_every_gradient_of_its_row(device):
    values, indices = codes(4, 9, 3)
    values[2, 1] = math.nan
    given = (values, indices, normal(5, 9, 6), normal(6, 4, 6), normal(7, 6), torch.ones(4))
    found = fused_ops().reconstruct(*(tensor.to(device) for tensor in given))
    assert found.squares.isnan().tolist() == [False, False, True, False]
    assert found.grad[2].isnan().all()
    assert found.dz[2, 1].isnan()
    assert found.pull.isnan().all()


# ---- a matrix's gradient ---------------------------------------------------------------------------


def test_segments_without_asking_the_device_are_those_with(device):
    indices = codes(30, 12, 4)[1].to(device)
    found, expected = segments_unasked(indices, 12), segments_of(indices, 12)
    for name, one, other in zip(expected._fields, found, expected, strict=True):
        assert torch.equal(one.long(), other), name
    chosen = (indices % 3 > 0).to(device)
    found, expected = segments_unasked(indices, 12, chosen), segments_of(indices, 12, chosen)
    assert torch.equal(found.ends, expected.ends)
    count = int(chosen.sum())
    assert int(found.ends[-1]) == count < indices.numel()
    for name in ("order", "row", "latent"):
        assert torch.equal(getattr(found, name)[:count].long(), getattr(expected, name)), name
    assert (found.latent[count:] == 12).all()


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_finished_as_if_one_step_after_another(device, add, dtype):
    B, D, N, K = 140, 21, 30, 2  # latent 0 has two chunks
    values, indices = codes(B, N, K)
    rows, W = normal(5, B, D).to(dtype), directions(6, N, D)
    before, dead, ids = normal(7, N, D), normal(8, 2, D), torch.tensor([0, 8])
    bias = normal(9, N)
    expected = reference.scatter(values, indices, N).T @ rows.float()
    expected += before if add else 0
    expected[ids] += dead
    expected -= (expected * W).sum(1, keepdim=True) * W
    segments = segments_unasked(indices.to(device), N)
    out, found_bias = before.clone().to(device), bias.clone().to(device)
    squares = torch.empty(N, device=device)
    fused_ops().add_sums(
        out,
        values.to(device).flatten()[segments.order],
        segments,
        rows.to(device),
        bias=found_bias,
        finish=Finish(add, (places_of(ids.to(device), N), dead.to(device)), W.to(device), squares),
    )
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(squares.cpu(), expected.square().sum(1), rtol=1e-4, atol=2e-5)
    sums = torch.zeros(N).index_add_(0, indices.flatten(), values.flatten())
    torch.testing.assert_close(found_bias.cpu(), bias + sums, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("projects", [False, True])
def test_rows_are_finished_after_their_sum_has_crossed_a_mesh(device, projects):
    grad, W = normal(1, 7, 35), directions(2, 7, 35)
    expected = grad - (grad * W).sum(1, keepdim=True) * W if projects else grad
    found = grad.clone().to(device)
    squares = fused_ops().finish_rows(found, W.to(device) if projects else None)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(squares.cpu(), expected.square().sum(1), rtol=1e-5, atol=1e-5)


# ---- the update ------------------------------------------------------------------------------------

ADAM = AdamStep(0.01, (0.9, 0.999), 1e-8, 1)


class Matrix:
    """Weights with all that an update changes."""

    def __init__(self, kind: MomentsDtype, device: torch.device, shape: tuple[int, int] = (5, 37)) -> None:
        self.weights = directions(1, *shape).to(device)
        self.state = new_state(self.weights, kind)
        self.average, self.low = torch.zeros_like(self.weights), self.weights.bfloat16()

    def step(self, number: int, *, largest: float | None = 2.0, norm: float = 3.0, loss: float = 0.5) -> None:
        grad = normal(number, *self.weights.shape).to(self.weights.device)
        fused_ops().update_rows(
            self.weights,
            grad,
            self.state,
            ADAM._replace(number=number),
            torch.tensor(loss, device=grad.device),
            torch.tensor(norm, device=grad.device),
            largest=largest,
            unit=True,
            average=(self.average, 0.125),
            low=self.low,
            seed=number,
        )

    def tensors(self) -> list[Tensor]:
        return [self.weights, self.average, self.low, *self.state.values()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("largest", [None, 2.0])
def test_an_update_is_clipping_adam_renormalising_and_averaging(device, kind, largest):
    made = Matrix(kind, device)
    parameter = torch.nn.Parameter(made.weights.cpu().clone())
    adam = torch.optim.Adam([parameter], lr=ADAM.lr, betas=ADAM.betas, eps=ADAM.eps)
    average = torch.zeros_like(parameter)
    # packed moments are exact in the first step, whose gradient they come from
    for number in (1, 2, 3) if kind == "float32" else (1,):
        made.step(number, largest=largest)
        parameter.grad = normal(number, 5, 37) * (1 if largest is None else largest / 3.0)
        adam.step()
        with torch.no_grad():
            renormalise_decoder(parameter)
            average.lerp_(parameter, 0.125)
        torch.testing.assert_close(made.weights.cpu(), parameter.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(made.average.cpu(), average, rtol=1e-5, atol=1e-6)
        assert torch.equal(made.low, made.weights.bfloat16())
    first, second = (t.cpu() for t in unpack_moments(made.state, slice(None), made.weights))
    exact = adam.state[parameter]
    step = {"float32": (1e-6, 1e-6), "bfloat16": (2**-7, 2**-7), "int8": (1 / 127, 1 / 255)}[kind]
    largest_first = exact["exp_avg"].abs().amax(1, keepdim=True)
    assert ((first - exact["exp_avg"]).abs() <= step[0] * largest_first + 1e-7).all()
    roots = exact["exp_avg_sq"].sqrt()
    assert ((second.sqrt() - roots).abs() <= step[1] * 1.001 * roots.amax(1, keepdim=True) + 1e-7).all()
    assert (second > 0).all()


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_random_rounding_keeps_the_mean(device, kind):
    made = Matrix(kind, device, (100, 8))
    grad = torch.tensor([1.0, -1.001, 0.3, 0.77, -0.123, 0.5, 0.011, 0.0]).repeat(100, 1).to(device)
    one = torch.tensor(1.0, device=device)
    more = {"largest": None, "unit": False, "average": None, "low": None, "seed": 3}
    fused_ops().update_rows(made.weights, grad, made.state, ADAM, one, one, **more)
    first = unpack_moments(made.state, slice(None), made.weights).first.double()
    # of 100 draws the mean is within five standard deviations of the largest step
    step = 0.1 * 1.001 / 127 if kind == "int8" else 0.1 * 2**-7
    assert ((first.mean(0) - 0.1 * grad[0].double()).abs() < 5 * step / 2 / 10).all()
    assert (first[:, 7] == 0).all()
    assert all(len(first[:, column].unique()) == 2 for column in (2, 3, 4))


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_random_bits_follow_from_seed_and_place_alone(device, monkeypatch, kind):
    from winnow.trainer.kernels import update_triton

    found = []
    for block, seed in ((64, 5), (256, 5), (64, 6)):
        monkeypatch.setattr(update_triton, "power_of_two", lambda _, block=block: block)
        made, one = Matrix(kind, device), torch.tensor(1.0, device=device)
        grad = normal(2, 5, 37).to(device)
        more = {"largest": None, "unit": False, "average": None, "low": None, "seed": seed}
        fused_ops().update_rows(made.weights, grad, made.state, ADAM, one, one, **more)
        found.append(made.state)
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(found[0][name], found[1][name])
        assert not torch.equal(found[0][name], found[2][name])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_leaves_everything_as_it_was(device, kind):
    made = Matrix(kind, device)
    made.step(1)
    before = [tensor.clone() for tensor in made.tensors()]
    made.step(2, norm=math.nan)
    made.step(2, norm=math.inf)
    made.step(2, loss=math.nan)
    assert all(torch.equal(*pair) for pair in zip(made.tensors(), before, strict=True))
    made.step(2)
    assert not torch.equal(made.weights, before[0])


# ---- the step --------------------------------------------------------------------------------------


def run_on(device: torch.device, **fields) -> Run:
    D, N, K = 6, 16, 2
    base = {"out": "x", "hook": "h.1", "latents": N, "k": K, "batch_rows": 64, "epochs": 8, "lr": 0.003}
    spec = TrainSpec.model_validate(
        base | {"dead_after_tokens": 8, "auxk_k": 2, "kernels": "triton"} | fields
    )
    sae = Sae(D, N, K, device=device)
    constant = initialise(sae, normal(9, 100, D).to(device), torch.ones(100, device=device), seed=0)
    return Run(sae, Recipe.resolve(spec, D, steps_per_epoch=5), constant)


def go(run: Run, steps: range) -> None:
    for step in steps:
        train_step(run, normal(step, 8, 6).to(run.device), torch.ones(8))


def test_a_run_resumes_with_the_same_bits(device):
    fields = {"compute_dtype": "bfloat16", "moments": "int8"}
    whole, first, second = (run_on(device, **fields) for _ in range(3))
    go(whole, range(3))
    go(first, range(2))
    unpack(second, pack(first))
    go(second, range(2, 3))
    assert whole.counts.auxk_steps  # some latents died, and were counted on the way
    end, again = pack(whole), pack(second)
    assert end.keys() == again.keys()
    for name, tensor in end.items():
        assert torch.equal(again[name], tensor), name
    assert whole.adam.state[whole.sae.W_dec]["step"].item() == 3


def test_sums_that_cross_a_mesh_are_finished_afterwards(device):
    found = []
    for crosses in (False, True):
        run = run_on(device)
        batch = prepare(run, normal(3, 8, 6).to(device), torch.ones(8))
        step = sparse.begin(StepContext.of(run, batch.weights.cpu()), 1)
        if crosses:
            # an axis of one rank, whose sums are what they were
            step._gradients = Gradients(step._model, run.world.data)
        step.take(batch)
        norm = step.end().read()[0].grad_norm
        found.append((norm, [getattr(run.sae, name).grad for name in run.sae.parameter_names]))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    for one, other in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_weights_that_others_write_are_rounded_anew(device):
    run = run_on(device, compute_dtype="bfloat16")
    go(run, range(1))
    kept = run.rounded.written("W_enc")
    assert kept is not None
    assert torch.equal(kept, run.sae.W_enc.bfloat16())
    with torch.no_grad():
        run.sae.W_enc.mul_(2)
    go(run, range(1, 2))
    assert torch.equal(run.rounded.written("W_enc"), run.sae.W_enc.bfloat16())
    assert run.rounded.written("W_enc") is not kept


def test_a_step_that_is_not_finite_leaves_weights_moments_and_averages(device):
    from winnow.schemas.errors import NonFiniteError

    run = run_on(device, normalize="none")
    go(run, range(2))
    before = {name: tensor.clone() for name, tensor in pack(run).items()}
    rows = normal(2, 8, 6)
    rows[5, 3] = math.inf
    with pytest.raises(NonFiniteError):
        train_step(run, rows.to(device), torch.ones(8))
    for name, tensor in pack(run).items():
        assert torch.equal(tensor, before[name]), name
