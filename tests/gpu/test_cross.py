"""A step of a cross-layer set by kernels, against its specification, and what only its wide rows need."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.cross import LAYERS, K, batch, make_cross
from winnow.trainer.kernels import reference
from winnow.trainer.kernels.fused_ops import AdamStep, Finish, fused_ops
from winnow.trainer.kernels.segment_grad import segments_unasked
from winnow.trainer.step.cross_train import train_cross
from winnow.trainer.step.moments import new_state

pytestmark = pytest.mark.gpu
MATRICES = ("W_enc", "b_enc", "W_dec", "b_pre", "b_dec")


def normal(seed: int, *sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def small(step: int, device: torch.device) -> tuple[list[Tensor], list[Tensor], Tensor]:
    inputs, targets, weights = batch(step, torch.float32)
    keep = weights > 0  # the interpreter's time is by rows
    return (
        [x[keep][:12].to(device) for x in inputs],
        [y[keep][:12].to(device) for y in targets],
        weights[keep][:12],
    )


@pytest.mark.parametrize(
    ("fields", "rounded"),
    [
        ({"activation": "batchtopk", "accumulate": 2}, False),
        ({"compute_dtype": "bfloat16", "moments": "int8"}, True),
    ],
    ids=["batchtopk in parts", "topk in bfloat16"],
)
def test_the_step_of_a_set_is_its_specification(device, monkeypatch, fields, rounded):
    """Rows of all targets, 18, are wider than a kernel holds at once; those of one, 6, are not."""
    from winnow.trainer.kernels import segment_grad_triton, update_triton

    for module, widest in ((update_triton, "WIDEST"), (segment_grad_triton, "LARGEST_BLOCK")):
        monkeypatch.setattr(module, widest, 16)
        monkeypatch.setattr(module, "WIDE_TILE", 16)
    base = {"clip_norm": 0.5, "latents": 16, "k": K, "auxk_k": 4, "device": str(device)}
    kernels = "cpu" if rounded or "accumulate" in fields else "eager"
    spec = make_cross(kernels, dtype=torch.float32, **base | fields)
    found = make_cross("triton", dtype=torch.float32, **base | fields)
    for run in found:
        assert run.kernels == "triton"
        run.sae.to(device)
    for runs in (spec, found):
        for run in runs:
            run.dead.since[::3] = 1000
    for step in range(2):
        told = train_cross(found, *small(step, device))
        expected = train_cross(spec, *small(step, torch.device("cpu")))
        assert told is not None
        assert expected is not None
        loose = 2e-2 if rounded else 2e-4
        for one, other in zip(told, expected, strict=True):
            assert step or one.auxk > 0
            for name in ("loss", "auxk", "grad_norm"):
                assert getattr(one, name) == pytest.approx(getattr(other, name), rel=loose), name
        for number in range(LAYERS):
            for name in MATRICES:
                grads = [getattr(runs[number].sae, name).grad.cpu() for runs in (found, spec)]
                atol = (loose if rounded else 1e-5) * grads[1].abs().max().item()
                torch.testing.assert_close(*grads, rtol=1e-3, atol=atol, msg=f"{number}.{name}")
    for one, other in zip(found, spec, strict=True):
        weights = [run.sae.W_dec.detach().cpu() for run in (one, other)]
        torch.testing.assert_close(*weights, rtol=0, atol=0.02 if rounded else 1e-3)
        assert one.adam.state[one.sae.W_dec]["step"].item() == 2


def test_what_is_decoded_is_added(device):
    indices = torch.randint(9, (5, 3), generator=torch.Generator().manual_seed(3))
    values, W, before = normal(4, 5, 3), normal(5, 9, 20), normal(6, 5, 20)
    out = before.clone().to(device)
    fused_ops().add_decoded(out, values.to(device), indices.to(device), W.to(device))
    torch.testing.assert_close(out.cpu(), before + reference.decode(values, indices, W), rtol=1e-5, atol=1e-5)


def test_sums_are_written_to_columns_and_the_others_left(device):
    """Of a hot latent too, whose chunks are joined."""
    indices = torch.randint(6, (140, 2), generator=torch.Generator().manual_seed(3))
    indices[:, 0] = 0
    values, rows, before = normal(4, 140, 2), normal(5, 140, 7), normal(6, 7, 30)
    segments = segments_unasked(indices.to(device), 7)
    out = before.clone().to(device)
    sorted_values = values.to(device).flatten()[segments.order]
    fused_ops().add_sums(out[:, 10:17], sorted_values, segments, rows.to(device), finish=Finish(add=True))
    before[:, 10:17] += reference.segment_grad(values, indices, rows, 7)
    torch.testing.assert_close(out.cpu(), before, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_a_wide_row_is_updated_as_if_it_were_held_at_once(device, monkeypatch, kind):
    from winnow.trainer.kernels import update_triton

    found = []
    for widest in (64, 16):
        monkeypatch.setattr(update_triton, "WIDEST", widest)
        monkeypatch.setattr(update_triton, "WIDE_TILE", 16)
        weights = torch.nn.functional.normalize(normal(1, 3, 37), dim=1).to(device)
        state, low, average = new_state(weights, kind), weights.bfloat16(), torch.zeros_like(weights)
        for number in (1, 2):
            grad, one = normal(number + 1, 3, 37).to(device), torch.ones((), device=device)
            fused_ops().update_rows(
                weights, grad, state, AdamStep(0.01, (0.9, 0.999), 1e-8, number), one, 3 * one,
                largest=2.0, unit=True, average=(average, 0.125), low=low, seed=number,
            )  # fmt: skip
        found.append([weights, low.float(), average, *(t.float() for t in state.values())])
    for one, other in zip(*found, strict=True):
        # a step's last bit may round a packed moment to its neighbour
        rounded = 1.0 if kind == "int8" and one.max() > 2 else 2**-8
        torch.testing.assert_close(one, other, rtol=2**-8, atol=1e-6 if kind == "float32" else rounded)
    torch.testing.assert_close(found[1][0].norm(dim=1), torch.ones(3, device=device))


@pytest.mark.parametrize("projects", [False, True])
def test_a_wide_row_is_projected_and_measured(device, monkeypatch, projects):
    from winnow.trainer.kernels import segment_grad_triton

    monkeypatch.setattr(segment_grad_triton, "LARGEST_BLOCK", 16)
    monkeypatch.setattr(segment_grad_triton, "WIDE_TILE", 16)
    grad, W = normal(1, 4, 37), torch.nn.functional.normalize(normal(2, 4, 37), dim=1)
    expected = grad - (grad * W).sum(1, keepdim=True) * W if projects else grad
    found = grad.clone().to(device)
    squares = fused_ops().finish_rows(found, W.to(device) if projects else None)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(squares.cpu(), expected.square().sum(1), rtol=1e-5, atol=1e-5)
