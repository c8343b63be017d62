"""The Triton kernels where there is no GPU: interpreted, and compiled for one all the same."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


def test_the_gpu_tests_pass_under_the_interpreter():
    """In a process of its own, because Triton decides on import whether it interprets."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "tests/gpu/test_triton.py",
            "--no-skips",
            "-q",
            "-p",
            "no:cacheprovider",
        ],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_they_compile_for_a_gpu(dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from winnow.trainer.kernels import (
        decode_grad_values_triton,
        decode_triton,
        encode_topk_triton,
        segment_grad_triton,
    )

    t, f, i, n = f"*{dtype}", "*fp32", "*i64", "i32"
    blocks = {"CHUNK": segment_grad_triton.CHUNK, "BLOCK_D": 1024}
    sweep = {"SLOTS": 32, "STRIPE": 8, "ROWS": 128, "COLUMNS": 128, "DEPTH": 32, "WIDEN": False}
    kernels = [
        (decode_triton._decode, [f, i, t, t, n, n], {"BLOCK_D": 1024}),
        (decode_grad_values_triton._dots, [t, i, t, f, n, n], {"BLOCK_K": 16, "BLOCK_D": 256}),
        (segment_grad_triton._whole, [f, i, i, t, t, n], blocks),
        (segment_grad_triton._chunk, [f, i, i, t, i, i, f, n, n], blocks),
        (segment_grad_triton._join, [i, f, t, n], {"BLOCK_D": 1024}),
        (encode_topk_triton._sweep, [t, t, t, f, f, "*i32", "*i32", n, n, n, n], sweep),
    ]
    for kernel, types, constants in kernels:
        signature = dict(zip(kernel.arg_names, [*types, *["constexpr"] * len(constants)], strict=True))
        assert list(signature)[len(types) :] == list(constants)
        source = ASTSource(kernel, signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
        assert compiled.asm["cubin"]
