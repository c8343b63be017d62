"""Rows as they are stored give the same step, to the bit, as rows that the store has widened."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from winnow.sae.init import initialise
from winnow.sae.model import Sae
from winnow.schemas.training import TrainSpec
from winnow.store.format.shards import to_float32, to_stored
from winnow.trainer.run.start import rows_of
from winnow.trainer.step import Recipe, Run, train_step
from winnow.trainer.step.widen import widened

ROWS, D, N, K = 128, 24, 64, 4
DTYPES = ["bfloat16", "float16", "float32", "int8"]


def stored_rows(dtype: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as they are stored, and as the store widens them; a row of zeros, and large and small ones."""
    rows = np.random.default_rng(seed).normal(size=(ROWS, D)).astype(np.float32)
    rows[0] = 0
    rows[1:4] *= 1000
    rows[4:8] /= 1000
    stored = to_stored(rows, dtype)
    given = torch.from_numpy(stored)
    return given.view(torch.bfloat16) if dtype == "bfloat16" else given, torch.from_numpy(
        to_float32(stored, dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_widened_rows_have_the_bits_of_the_stores(dtype):
    stored, wide = stored_rows(dtype)
    assert stored.shape[1] == D + (4 if dtype == "int8" else 0)
    found = widened(stored)
    assert found.dtype == torch.float32
    assert torch.equal(found, wide)
    assert widened(wide) is wide
    assert torch.equal(widened(stored[3:7]), wide[3:7])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_step_on_stored_rows_has_the_same_bits(dtype, accumulate):
    stored, wide = stored_rows(dtype)
    target = stored_rows(dtype, seed=1)
    weights = torch.ones(ROWS)
    weights[5] = 0
    fields = {"hook": "resid_mid.1", "target_hook": "mlp_out.1", "normalize": "dataset"}
    spec = TrainSpec(out="x", latents=N, k=K, batch_rows=ROWS, accumulate=accumulate, **fields)
    made = []
    for rows, y in ((stored, target[0]), (wide, target[1])):
        sae = Sae(D, N, K, spec.normalize, spec.parts({"resid_mid.1": D, "mlp_out.1": D}))
        constant = initialise(sae, wide, weights, seed=0, target=target[1])
        run = Run(sae, Recipe.resolve(spec, D, 100), constant)
        losses = [train_step(run, rows, weights, y).loss for _ in range(3)]
        made.append((losses, [p.detach() for p in sae.parameters()]))
    assert made[0][0] == made[1][0]
    assert all(torch.equal(one, other) for one, other in zip(made[0][1], made[1][1], strict=True))


def test_packed_rows_of_a_crosscoder_are_joined_without_their_scales():
    (a, a_wide), (b, b_wide) = stored_rows("int8", 0), stored_rows("int8", 1)
    spec = TrainSpec(out="x", hook="h.1", with_hooks=("h.2",), latents=N, k=K, normalize="dataset")
    joined, target = rows_of({"h.1": a, "h.2": b}, spec)
    assert torch.equal(joined, torch.cat([a_wide, b_wide], 1))
    assert target is None
