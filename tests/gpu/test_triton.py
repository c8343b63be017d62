"""Every Triton kernel against its dense equivalent, and the step that is made of them."""

from __future__ import annotations

import os

import pytest
import torch

from winnow.sae.init import initialise
from winnow.sae.model import PARAMETERS, Sae
from winnow.schemas.training import TrainSpec
from winnow.trainer.kernels import (
    choose,
    decode,
    decode_grad_values,
    decode_grad_weight,
    encode_topk,
    reference,
)
from winnow.trainer.step import Recipe, Run, train_step

pytestmark = pytest.mark.gpu
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# What a second half precision shows is a GPU's rounding, which the interpreter does not have.
DTYPES = [torch.float32, torch.bfloat16, *([] if INTERPRETED else [torch.float16])]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SHAPES = [  # B, D, N, K: empty, tiny, ragged, more than one program each way
    (0, 5, 9, 2),
    (3, 4, 6, 0),
    (5, 3, 7, 7),
    (37, 33, 300, 5),
]
# In the last a hot latent has several chunks. The interpreter takes milliseconds per latent and per entry.
SPARSE_SHAPES = [*SHAPES, (290, 21, 60, 3)]
if INTERPRETED:
    SPARSE_SHAPES = [*SHAPES[:-1], (37, 33, 60, 5), (140, 21, 9, 2)]
AUXK_AND_PARTS = [(64, 1), (1, 4), *([] if INTERPRETED else [(64, 4), (1, 1)])]


def normal(seed: int, *sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def data(shape, dtype, device, *, whole=False) -> list[torch.Tensor]:
    B, D, N, _ = shape
    made = [normal(seed, *size) for seed, size in enumerate(((B, D), (N, D), (N,)))]
    return [(t.round() if whole else t).to(device, dtype) for t in made]


def codes(shape, dtype, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, D, N, K = shape
    indices = torch.randint(max(1, N - 1), (B, K), generator=torch.Generator().manual_seed(3))
    if K:
        indices[:, 0] = 0  # hot; the last is idle
    return normal(4, B, K).to(device, dtype), indices.to(device), normal(5, B, D).to(device, dtype)


def close(found, expected, dtype):
    assert found.dtype == expected.dtype
    largest = expected.abs().max().item() if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[dtype] * max(1.0, largest))


@pytest.mark.parametrize("shape", [*SHAPES, (140, 17, 1100, 6)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_encode_topk_is_exact_ties_included(device, shape, dtype):
    x, W, b = data(shape, dtype, device, whole=True)
    values, indices = encode_topk(x, W, b, shape[3], "triton")
    expected = reference.encode_topk(x, W, b, shape[3])
    assert torch.equal(values, expected[0])
    assert torch.equal(indices, expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_are_done_again(device, dtype):
    from winnow.trainer.kernels.encode_topk_triton import encode_topk_counted

    x, W, b = data((150, 40, 1300, 4), dtype, device)
    found = encode_topk_counted(x, W, b, 4)
    assert found.redone <= 15
    close(found.values, reference.encode_topk(x, W, b, 4)[0], dtype)


def test_rows_that_overflow_or_hold_nan_are_exact(device):
    from winnow.trainer.kernels.encode_topk_triton import encode_topk_counted

    x, W, b = data((20, 8, 600, 3), torch.float32, device, whole=True)
    x[3], x[4, 2] = 0, torch.nan
    b = torch.arange(600.0, device=device).clone()  # rising: the seed's tau filters nothing
    found = encode_topk_counted(x, W, b, 3)
    expected = reference.encode_topk(x, W, b, 3)
    assert found.redone > 0
    assert torch.equal(found.values.nan_to_num(9e9), expected[0].nan_to_num(9e9))
    assert torch.equal(found.indices, expected[1])


@pytest.mark.parametrize("shape", SPARSE_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sparse_ops_equal_their_dense_equivalents(device, shape, dtype):
    values, indices, rows = codes(shape, dtype, device)
    _, W, _ = data(shape, dtype, device)
    N = shape[2]
    close(decode(values, indices, W, "triton"), reference.decode(values, indices, W), dtype)
    found = decode_grad_values(rows, indices, W, "triton")
    close(found, reference.decode_grad_values(rows, indices, W), dtype)
    found = decode_grad_weight(values, indices, rows, N, "triton")
    close(found, reference.segment_grad(values, indices, rows, N), dtype)
    assert torch.equal(found, decode_grad_weight(values, indices, rows, N, "triton"))


def test_they_are_proper_custom_ops(device):
    shape = (6, 3, 11, 2)
    x, W, b = (t.requires_grad_() for t in data(shape, torch.float32, device))
    values, indices, rows = codes(shape, torch.float32, device)
    check = torch.library.opcheck
    check(encode_topk, (x, W, b, 2, "triton"))
    check(decode, (values.clone().requires_grad_(), indices, W, "triton"))
    check(decode_grad_values, (rows, indices, W.detach(), "triton"))
    check(decode_grad_weight, (values, indices, rows, 11, "triton"))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"multi_topk": True},
        {"auxk_k": 1},
        {"auxk_k": 8},
        {"activation": "batchtopk", "auxk_coefficient": 0},
        {"matryoshka": [20], "activation": "batchtopk", "auxk_coefficient": 0},
    ],
    ids=[
        "plain",
        "multi",
        "auxk on codes",
        "auxk on the best of dense ones",
        "batchtopk",
        "matryoshka, batchtopk",
    ],
)
def test_the_step_is_the_eager_step(device, monkeypatch, fields):
    monkeypatch.setattr("winnow.trainer.step.auxk.DENSE_AUX_GPU", {"float32": 12})
    B, D, N, K = 40, 10, 90, 3
    runs = []
    for kernels in ("eager", "triton"):
        base = {"out": "x", "hook": "h.1", "latents": N, "k": K, "batch_rows": 64, "epochs": 8, "auxk_k": 64}
        base |= {"lr": 0.003, "dead_after_tokens": 50, "kernels": kernels}
        spec = TrainSpec.model_validate(base | fields)
        sae = Sae(D, N, K, parts=spec.parts({"h.1": D}), device=device)
        constant = initialise(sae, normal(9, 300, D), torch.ones(300), seed=0)
        runs.append(Run(sae, Recipe.resolve(spec, D, steps_per_epoch=5), constant))
        runs[-1].dead.since[: N // 3] = 1000
    weights = torch.ones(B, device=device)
    weights[::7] = 0
    for step in range(2):
        x = normal(20 + step, B, D).to(device)
        eager, found = (train_step(run, x.clone(), weights) for run in runs)
        assert eager is not None
        assert found is not None
        assert found.dead > 0
        for field in ("loss", "auxk", "grad_norm"):
            assert getattr(found, field) == pytest.approx(getattr(eager, field), rel=2e-4), field
        for name in PARAMETERS:
            grads = [getattr(run.sae, name).grad for run in runs]
            torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(("auxk_k", "accumulate"), AUXK_AND_PARTS)
def test_the_bfloat16_step_rounds_as_the_cpus_does(device, monkeypatch, auxk_k, accumulate):
    """Up to AuxK's dense products (of 64; 1 goes by its codes), in bfloat16 on a GPU. In several blocks."""
    B, D, N, K = 96, 10, 90, 3
    monkeypatch.setattr("winnow.trainer.kernels.step_ops.GPU_BLOCK_BYTES", 40 * D * 2)
    monkeypatch.setattr("winnow.trainer.step.auxk.DENSE_AUX_GPU", {"bfloat16": 12})
    runs = []
    for kernels, where in (("cpu", torch.device("cpu")), ("triton", device)):
        base = {"out": "x", "hook": "h.1", "latents": N, "k": K, "batch_rows": 64, "epochs": 8}
        base |= {"lr": 0.003, "dead_after_tokens": 50, "kernels": kernels, "compute_dtype": "bfloat16"}
        sae = Sae(D, N, K, device=where)
        constant = initialise(sae, normal(9, 300, D), torch.ones(300), seed=0)
        spec = TrainSpec.model_validate(base | {"auxk_k": auxk_k, "accumulate": accumulate})
        runs.append(Run(sae, Recipe.resolve(spec, D, steps_per_epoch=5), constant))
        runs[-1].dead.since[: N // 3] = 1000
    x = normal(20, B, D)
    expected, found = (train_step(run, x.to(run.device), torch.ones(B, device=run.device)) for run in runs)
    assert expected is not None
    assert found is not None
    assert found.dead > 0
    for field in ("loss", "auxk", "grad_norm", "l0"):
        assert getattr(found, field) == pytest.approx(getattr(expected, field), rel=2e-2), field
    for name in PARAMETERS:
        cpu, gpu = (getattr(run.sae, name).grad.cpu() for run in runs)
        assert gpu.dtype == torch.float32
        torch.testing.assert_close(gpu, cpu, rtol=0, atol=2e-2 * cpu.abs().max().item(), msg=name)


def test_it_can_be_chosen(device):
    assert choose("triton", device) == "triton"
    assert choose("auto", device) == ("triton" if device.type == "cuda" else "cpu")
