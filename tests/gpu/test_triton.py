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
from winnow.trainer.kernels.dispatch import triton_module
from winnow.trainer.kernels.encode_topk import Wanted, places_of
from winnow.trainer.kernels.step_ops import aligned
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
# More than a block of rows: the interpreter takes a tenth of a second per row.
ENCODE_SHAPES = [
    *SHAPES,
    *([(3, 17, 1100, 70)] if INTERPRETED else [(140, 17, 1100, 6), (3, 17, 1100, 1025)]),
]
STEP_ROWS = 16 if INTERPRETED else 48
AUXK_AND_PARTS = [(64, 1), (1, 4), *([] if INTERPRETED else [(64, 4), (1, 1)])]


def normal(seed: int, *sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def data(shape, dtype, device, *, whole=False) -> list[torch.Tensor]:
    B, D, N, _ = shape
    made = [normal(seed, *size) for seed, size in enumerate(((B, D), (N, D), (N,)))]
    return [(t.round() if whole else t).to(device, dtype) for t in made]


def beside(ids: list[int], x: torch.Tensor) -> Wanted:
    """Columns whose numbers are wanted, in rows that do not touch; each is NaN until it is filled."""
    z = aligned(len(x), len(ids), x).fill_(torch.nan)
    return Wanted(torch.tensor(ids, device=x.device), z)


def equal(found, expected):
    assert torch.equal(found[0].isnan(), expected[0].isnan())
    assert torch.equal(found[0].nan_to_num(0), expected[0].nan_to_num(0))
    assert torch.equal(found[1], expected[1])


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


@pytest.mark.parametrize("shape", ENCODE_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_encode_topk_is_exact_ties_included(device, shape, dtype):
    x, W, b = data(shape, dtype, device, whole=True)
    equal(encode_topk(x, W, b, shape[3], "triton"), reference.encode_topk(x, W, b, shape[3]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_its_values_are_the_dense_ones(device, dtype):
    x, W, b = data((5, 40, 700, 12), dtype, device)
    values, indices = encode_topk(x, W, b, 12, "triton")
    close(values, reference.encode_topk(x, W, b, 12)[0], dtype)
    dense = x.float() @ W.float().T + b.float()
    close(values, dense.gather(1, indices), dtype)
    assert all(len(set(row)) == 12 for row in indices.tolist())


@pytest.mark.parametrize("group", [2, 128])
def test_chunks_blocks_and_pieces_are_joined(device, monkeypatch, group):
    """Two chunks of rows, one of two blocks, and pieces of a row's groups, with ties across all of them."""
    from winnow.trainer.kernels import encode_topk_triton as module
    from winnow.trainer.kernels import groups

    B, D, N, K = 35, 5, 1000, 6
    monkeypatch.setattr(module, "group_size", lambda _latents, _k: group)
    for place in (module, groups):
        monkeypatch.setattr(place, "ROWS", 16)
    monkeypatch.setattr(groups, "HELD_BYTES", 32 * groups.GROUP_BYTES * groups.groups_of(N, group))
    assert groups.chunk_rows(N, group) == 32
    # more entries than are kept, or there would be no end of pieces
    piece = max(16, groups.groups_of(N, group) // 4)
    monkeypatch.setattr(module, "PIECE", piece)
    monkeypatch.setattr(module, "SMALL_PIECE", piece)
    x, W, b = data((B, D, N, K), torch.float32, device, whole=True)
    # beside them, columns of every block but one, the last among them
    wanted = beside([*range(3), *range(120, 140), *range(300, 900, 7), N - 1], x)
    equal(module.encode_topk(x, W, b, K, wanted), reference.encode_topk(x, W, b, K))
    assert torch.equal(wanted.z, x @ W[wanted.ids].T + b[wanted.ids])


def test_what_is_wanted_may_lie_further_than_32_bits_reach(device):
    """In the second block of rows, numbers are 2**31 and more from the first; nothing between is touched."""
    module = triton_module("encode_topk")
    x, W, b = data((130, 3, 5, 2), torch.bfloat16, device, whole=True)
    z = torch.empty(130 << 24, dtype=torch.bfloat16, device=device).as_strided((130, 2), (1 << 24, 1))
    ids = torch.tensor([1, 4], device=device)
    module.sweep(x, W, b.float(), 2, beside=(places_of(ids, 5), z))
    assert torch.equal(z.float(), x.float() @ W[ids].float().T + b[ids].float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 3])
def test_wanted_columns_come_without_a_sweep_too(device, monkeypatch, k, dtype):
    from winnow.trainer.kernels import encode_bounded_triton, encode_topk_triton

    monkeypatch.setattr(encode_topk_triton, "LARGEST_K", 2)
    for module in (encode_topk_triton.encode_topk, encode_bounded_triton.encode_topk_bounded):
        x, W, b = data((5, 7, 40, k), dtype, device, whole=True)
        wanted = beside([0, 3, 39], x)
        equal(module(x, W, b, k, wanted), reference.encode_topk(x, W, b, k))
        assert torch.equal(wanted.z, (x.float() @ W[wanted.ids].float().T + b[wanted.ids].float()).to(dtype))


@pytest.mark.parametrize("first", [0, 300])
def test_latents_that_are_active_together_are_all_found(device, first):
    """17 of 64 active latents among 24 neighbours, in whatever groups these are."""
    x, W, b = data((4, 16, 1100, 64), torch.float32, device, whole=True)
    b[first : first + 24] += 40
    values, indices = reference.encode_topk(x, W, b, 64)
    together = ((indices >= first) & (indices < first + 24)).sum(1)
    assert together.min() >= 17
    equal(encode_topk(x, W, b, 64, "triton"), (values, indices))


def test_rows_with_nan_infinity_or_nothing_but_ties_are_exact(device):
    x, W, b = data((6, 8, 300, 3), torch.float32, device, whole=True)
    x[3], x[4, 2] = 0, torch.nan
    W[77, 3] = W[299, 0] = torch.nan
    b[200:] = -torch.inf
    b[7] = torch.inf
    wanted = beside([7, 77, 250, 299], x)
    found = triton_module("encode_topk").encode_topk(x, W, b, 3, wanted)
    equal(found, reference.encode_topk(x, W, b, 3))
    assert found[0].isnan().any(1).all()
    torch.testing.assert_close(wanted.z, (x @ W.T + b)[:, wanted.ids], rtol=0, atol=0, equal_nan=True)


def test_the_search_for_a_threshold_ends(device):
    """Groups past the end, more of them kept than are compared at first, searches of different lengths."""
    W = normal(0, 300, 3).abs().to(device)
    x, b = torch.ones(3, 3, device=device), torch.zeros(300, device=device)
    x[1] = -1
    equal(encode_topk(x, W, b, 70, "triton"), reference.encode_topk(x, W, b, 70))


def test_fewer_numbers_above_minus_infinity_than_kept(device):
    x, W, b = data((3, 4, 200, 30), torch.float32, device, whole=True)
    b[20:] = -torch.inf
    equal(encode_topk(x, W, b, 30, "triton"), reference.encode_topk(x, W, b, 30))


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
    B, D, N, K = STEP_ROWS, 10, 90, 3
    runs = []
    for kernels in ("eager", "triton"):
        base = {"out": "x", "hook": "h.1", "latents": N, "k": K, "batch_rows": 64, "epochs": 8, "auxk_k": 64}
        # out of reach: the eager step cuts the gradients themselves, the kernels cut them in the update
        base |= {"lr": 0.003, "dead_after_tokens": 50, "kernels": kernels, "clip_norm": 100}
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
    B, D, N, K = 2 * STEP_ROWS, 10, 90, 3
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
