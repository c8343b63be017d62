"""Every kernel's CPU path against its dense equivalent, and as a custom op."""

from __future__ import annotations

import importlib.metadata
import logging
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from winnow.schemas.errors import ConfigError, DependencyMissing
from winnow.trainer.kernels import (
    choose,
    decode,
    decode_grad_values,
    decode_grad_weight,
    dispatch,
    encode_grad_weight,
    encode_topk,
    reference,
)
from winnow.trainer.kernels.best import Best, best
from winnow.trainer.kernels.encode_topk import COLUMN_TILE, ROW_TILE, Watch, encode_topk_cpu

ROOT = Path(__file__).parents[4]
STUB = """
#include <Python.h>
static struct PyModuleDef stub = {PyModuleDef_HEAD_INIT, "stub", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_stub(void) { return PyModule_Create(&stub); }
"""
SHAPES = [  # B, D, N, K: empty, ragged, K = N, several tiles, K too large to filter
    (0, 5, 9, 2),
    (1, 1, 1, 1),
    (7, 3, 5, 5),
    (3, 4, 6, 0),
    (37, 13, 41, 5),
    (ROW_TILE + 6, 5, COLUMN_TILE + 37, 8),
    (60, 3, 2 * COLUMN_TILE + 8, 300),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def data(shape, dtype=torch.float32, seed=0, whole=False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, W, b; `whole` numbers give exact sums and many ties."""
    B, D, N, _ = shape
    draw = torch.Generator().manual_seed(seed)
    made = [torch.randn(size, generator=draw, dtype=torch.float64) for size in ((B, D), (N, D), (N,))]
    x, W, b = [(t.round() if whole else t).to(dtype) for t in made]
    return x, W, b


def close(found, expected, dtype):
    assert found.dtype == expected.dtype
    largest = expected.abs().max().item() if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[dtype] * max(1.0, largest))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_encode_topk_is_exact_ties_included(shape, dtype):
    x, W, b = data(shape, dtype, whole=True)
    values, indices = encode_topk(x, W, b, shape[3], "cpu")
    expected = reference.encode_topk(x, W, b, shape[3])
    assert torch.equal(values, expected[0])
    assert torch.equal(indices, expected[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_values_are_the_dense_ones(shape, dtype):
    x, W, b = data(shape, dtype)
    values, indices = encode_topk(x, W, b, shape[3], "cpu")
    dense, _ = reference.encode_topk(x, W, b, shape[2])
    close(values, dense[:, : shape[3]], dtype)
    assert all(len(set(row)) == shape[3] for row in indices.tolist())
    picked = (W.to(values.dtype)[indices] * x.to(values.dtype)[:, None]).sum(2) + b.to(values.dtype)[indices]
    close(values, picked, dtype)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 700), st.integers(1, 9), st.sampled_from([0, 1, 3]), st.integers(0, 99)
)
def test_the_running_best_is_the_best_of_all_blocks(rows, columns, k, levels, seed):
    """Blocks of any width; few levels make ties everywhere, one makes nothing else."""
    draw = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, columns, generator=draw)
    if levels:
        z = torch.randint(levels, (rows, columns), generator=draw).float()
    k = min(k, columns)
    running, left = Best(k), 0
    while left < columns:
        width = int(torch.randint(1, 300, (1,), generator=draw))
        running.feed(z[:, left : left + width].contiguous(), left)
        left += width
    expected = z.sort(dim=1, descending=True, stable=True)
    values, indices = running.ordered()
    assert torch.equal(values, expected.values[:, :k])
    assert torch.equal(indices, expected.indices[:, :k])


@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
def test_numbers_that_are_not_finite_are_ranked_as_torch_does(number):
    z = torch.randn(20, 900, generator=torch.Generator().manual_seed(0))
    z[3], z[5, ::7], z[6, 850], z[7, :] = number, number, number, -torch.inf
    running = Best(4)
    running.feed(z[:, :500].contiguous(), 0)
    running.feed(z[:, 500:].contiguous(), 500)
    values, indices = running.ordered()
    expected = z.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values.nan_to_num(9e9), expected.values[:, :4].nan_to_num(9e9))
    assert torch.equal(indices, expected.indices[:, :4])


def test_columns_that_rise_give_every_block_more_hits_than_it_filters():
    z = torch.arange(3 * 4000, dtype=torch.float32).view(3, 4000).contiguous()
    running = Best(5)
    for left in range(0, 4000, 1000):
        running.feed(z[:, left : left + 1000].contiguous(), left)
    assert torch.equal(running.ordered()[1], torch.arange(3999, 3994, -1).expand(3, 5))


def test_best_keeps_the_lower_id_among_equals():
    values = torch.tensor([[1.0, 2, 2, 2, 0]])
    assert set(best(values, 2)[1][0].tolist()) == {1, 2}
    ids = torch.tensor([[9, 8, 7, 1, 2]])
    assert set(best(values, 2, ids)[1][0].tolist()) == {2, 3}


def test_watched_columns_are_handed_on():
    shape = (ROW_TILE + 5, 4, 2 * COLUMN_TILE + 9, 3)
    x, W, b = data(shape)
    ids = torch.tensor([0, 5, COLUMN_TILE - 1, COLUMN_TILE, 2 * COLUMN_TILE + 8])
    seen = torch.full((shape[0], len(ids)), torch.nan)

    def sink(rows, columns, z):
        seen[rows, columns] = z

    values, indices = encode_topk_cpu(x, W, b, 3, Watch(ids, sink))
    close(seen, x @ W[ids].T + b[ids], torch.float32)
    plain = encode_topk_cpu(x, W, b, 3)
    assert torch.equal(values, plain[0])
    assert torch.equal(indices, plain[1])


def codes(shape, dtype, seed=1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """values, indices (a hot latent, an idle one, repeats within a row) and rows."""
    B, D, N, K = shape
    draw = torch.Generator().manual_seed(seed)
    indices = torch.randint(max(1, N - 1), (B, K), generator=draw)
    if K:
        indices[:, 0] = 0
    values = torch.randn(B, K, generator=draw, dtype=torch.float64).to(dtype)
    return values, indices, torch.randn(B, D, generator=draw, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", [*SHAPES, (300, 2000, 50, 4)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_sparse_ops_equal_their_dense_equivalents(shape, dtype):
    values, indices, rows = codes(shape, dtype)
    _, W, _ = data(shape, dtype)
    N = shape[2]
    close(decode(values, indices, W, "cpu"), reference.decode(values, indices, W), dtype)
    found = decode_grad_values(rows, indices, W, "cpu")
    close(found, reference.decode_grad_values(rows, indices, W), dtype)
    expected = reference.segment_grad(values, indices, rows, N)
    close(decode_grad_weight(values, indices, rows, N, "cpu"), expected, dtype)
    assert torch.equal(encode_grad_weight(values, indices, rows, N, "eager"), expected)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_they_are_proper_custom_ops(backend):
    shape = (6, 3, 11, 2)
    x, W, b = (t.requires_grad_() for t in data(shape, torch.float64))
    values, indices, rows = codes(shape, torch.float64)
    check = torch.library.opcheck
    check(encode_topk, (x, W, b, 2, backend))
    check(decode, (values.clone().requires_grad_(), indices, W, backend))
    check(decode_grad_values, (rows, indices, W.detach(), backend))
    check(decode_grad_weight, (values, indices, rows, 11, backend))


def model(x, W_enc, b, W_dec, k, backend):
    values, indices = encode_topk(x, W_enc, b, k, backend)
    return decode(values.relu(), indices, W_dec, backend)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gradients_equal_dense_autograd(dtype, tolerance):
    shape = (200, 48, 700, 9)
    x, W_enc, b = (t.requires_grad_() for t in data(shape, dtype))
    W_dec = torch.nn.functional.normalize(data(shape, dtype, seed=5)[1], dim=1).requires_grad_()
    target = data(shape, dtype, seed=6)[0]
    pre = x @ W_enc.T + b
    mask = torch.zeros_like(pre).scatter(1, pre.topk(9, dim=1).indices, 1.0)
    wanted = [x, W_enc, b, W_dec]
    expected = torch.autograd.grad((((pre * mask).relu() @ W_dec - target).square().mean()), wanted)
    found = torch.autograd.grad((model(*wanted, 9, "cpu") - target).square().mean(), wanted)
    for name, a, e in zip(("x", "W_enc", "b", "W_dec"), found, expected, strict=True):
        assert (a - e).abs().max() <= tolerance * max(1.0, e.abs().max().item()), name


def test_gradients_pass_gradcheck():
    x, W, b = (t.requires_grad_() for t in data((4, 3, 9, 2), torch.float64))
    assert torch.autograd.gradcheck(lambda *a: model(*a, W, 2, "cpu"), (x, W, b))


def test_a_compiler_sees_through_shapes():
    shape = (8, 4, 20, 3)
    x, W, b = data(shape)
    whole = torch.compile(lambda *a: model(*a, W, 3, "cpu"), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(x, W, b), model(x, W, b, W, 3, "cpu"))


def test_gradients_are_the_same_bits_every_run():
    shape = (700, 64, 900, 16)
    values, indices, rows = codes(shape, torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = [decode_grad_weight(values, indices, rows, 900, "cpu") for _ in range(4)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_the_choice_is_explicit_and_logged(caplog):
    cpu = torch.device("cpu")
    with caplog.at_level(logging.INFO, "winnow.trainer"):
        assert choose("auto", cpu) == "cpu"
    assert "cpu on cpu" in caplog.text
    assert choose("eager", cpu) == "eager"
    with pytest.raises(ConfigError, match="auto, eager, cpu or triton"):
        choose("fast", cpu)
    with pytest.raises(ConfigError, match="kernels: auto"):
        choose("cpu", torch.device("cuda"))
    with pytest.raises(ConfigError, match="backend"):
        decode(*codes((2, 3, 4, 1), torch.float32)[:2], torch.zeros(4, 3), "fast")


def test_triton_asked_for_and_absent_says_what_to_install(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(dispatch.importlib, "import_module", absent)
    with pytest.raises(DependencyMissing, match=r"pip install triton==3\.7\.1"):
        choose("triton", torch.device("cpu"))
    with pytest.raises(DependencyMissing, match=r"pip install triton==3\.7\.1"):
        choose("auto", torch.device("cuda"))


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (['triton==3.8.0; platform_system == "Linux"'], "3.8.0"),
        (['triton~=3.9.0; platform_system == "Linux" and python_version < "3.16"'], "3.9.0"),  # torch 2.15's
        ([], dispatch.TRITON),
    ],
)
def test_the_version_that_the_message_names_is_the_installed_torchs(monkeypatch, asked, named):
    def absent(name):
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(dispatch, "requires", lambda _: ["filelock", *asked])
    monkeypatch.setattr(dispatch.importlib, "import_module", absent)
    with pytest.raises(DependencyMissing, match=re.escape(f"pip install triton=={named}`")):
        choose("auto", torch.device("cuda"))


def test_the_version_that_the_message_names_is_torchs_and_ours():
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"triton=={dispatch.TRITON}" in pinned
    asked = [line for line in importlib.metadata.requires("torch") or [] if line.startswith("triton")]
    assert all(line.startswith(f"triton=={dispatch.TRITON};") for line in asked)


class TestTritonStarts:
    """Triton's own build, of a small C file in place of its driver, which needs a GPU's library."""

    @pytest.fixture(autouse=True)
    def build(self, monkeypatch, tmp_path):
        support = pytest.importorskip("winnow.trainer.kernels.support_triton")
        from triton.runtime.build import compile_module_from_src

        class Driver:
            @property
            def active(self):
                return compile_module_from_src(STUB, "stub")

        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(support, "driver", Driver())
        monkeypatch.setattr(support, "interpreted", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def test_without_a_compiler_the_message_says_so_and_how_to_get_one(self, monkeypatch):
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", "")
        with pytest.raises(DependencyMissing, match=r"neither gcc nor clang.*apt-get install gcc libc6-dev"):
            choose("auto", torch.device("cuda"))

    def test_without_pythons_headers_too(self, monkeypatch, tmp_path):
        monkeypatch.setattr("sysconfig.get_paths", lambda _scheme=None, **_: {"include": str(tmp_path)})
        with pytest.raises(DependencyMissing, match=r"no .*Python\.h.*python3\.\d+-dev"):
            choose("auto", torch.device("cuda"))

    def test_a_compiler_that_fails_is_named(self, monkeypatch):
        monkeypatch.setenv("CC", "false")
        with pytest.raises(DependencyMissing, match="the C compiler failed"):
            choose("triton", torch.device("cuda"))

    def test_with_both_it_starts(self):
        assert choose("auto", torch.device("cuda")) == "triton"
