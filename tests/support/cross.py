"""Small cross-layer sets in float64, and batches for them."""

from __future__ import annotations

from typing import Any

import torch

from winnow.sae.model import Sae
from winnow.schemas.training import TrainSpec
from winnow.trainer.mesh.world import World
from winnow.trainer.run.checkpoint import pack
from winnow.trainer.step import Recipe, Run
from winnow.trainer.step.cross_init import initialise_cross
from winnow.trainer.step.cross_train import train_cross

B, D, N, K, LAYERS = 96, 6, 40, 3, 3


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[list, list, torch.Tensor]:
    """Inputs, targets and weights: some rows weigh nothing; in step 4 a whole half, in step 5 all."""
    draw = torch.Generator().manual_seed(step)
    first = torch.randn(B, D, generator=draw, dtype=torch.float64)
    inputs = [first * 3 + 1]
    targets: list[torch.Tensor] = []
    for layer in range(LAYERS):
        x = inputs[-1]
        mixed = torch.randn(D, D, generator=torch.Generator().manual_seed(100 + layer), dtype=torch.float64)
        targets.append((x @ mixed).relu() * (1 + layer) + layer)
        inputs.append(x + 0.1 * targets[-1])
    weights = torch.rand(B, generator=draw, dtype=torch.float64) + 0.5
    weights[step::9] = 0
    if step == 4:
        weights[: B // 2] = 0
    if step == 5:
        weights[:] = 0
    for rows in (*inputs, *targets):
        rows[weights == 0] = torch.nan
    return [x.to(dtype) for x in inputs[:LAYERS]], [y.to(dtype) for y in targets], weights.to(dtype)


def make_cross(
    kernels: str, world: World | None = None, dtype: torch.dtype = torch.float64, **fields: Any
) -> list[Run]:
    """Runs of a set over three layers, or this rank's shards of them, before their first step."""
    base: dict[str, Any] = {"out": "x", "latents": N, "k": K, "batch_rows": 64, "epochs": 8}
    base |= {"dead_after_tokens": 150, "auxk_k": 4, "lr": 0.003, "kernels": kernels}
    base |= {"set": {"layers": [2, 2 + LAYERS - 1], "cross": True}}
    spec = TrainSpec.model_validate(base | fields)
    runs: list[Run] = []
    for layer in range(2, 2 + LAYERS):
        of = spec.layer_spec(layer)
        parts = of.parts(dict.fromkeys(of.target_hooks, D))
        part = (world or World()).part(spec.latents)
        sae = Sae(D, len(part), spec.k, spec.normalize, parts, dtype=dtype)
        runs.append(Run(sae, Recipe.resolve(of, D, steps_per_epoch=5), 1.0, world))
    inputs, targets, weights = batch(99, dtype)
    initialise_cross(runs, inputs, targets, weights)
    with torch.no_grad():
        for number, run in enumerate(runs):
            # silent, so that AuxK has work; of all layers but one
            silent = torch.arange(spec.latents)[run.shard.part.start : run.shard.part.stop] < N // 5
            run.sae.b_enc[silent] = -30.0 if number != 1 else 0.0
    return runs


CASES: dict[str, dict[str, Any]] = {
    "topk": {},
    "batchtopk": {"activation": "batchtopk"},
    "batchtopk in one group": {"activation": "batchtopk", "selection_groups": 1},
    "clipped on every step": {"clip_norm": 1e-3},
    "K falls": {"k_start": 9},
    "all dead latents": {"auxk_k": N},
    "targets as they are": {"target_normalize": "none"},
    "in parts": {"accumulate": 2},
    "in parts, batchtopk": {"accumulate": 2, "activation": "batchtopk"},
}
"""Recipes; the specification has no parts and no packed moments."""
REPORTED = ("loss", "auxk", "grad_norm", "lr", "dead", "fvu", "l0", "rows")


def go_cross(runs: list[Run], steps: int = 8) -> list[list[dict[str, float]]]:
    """Take the steps on this rank's share of each batch; what each layer reported."""
    data, told = runs[0].world.data, []
    share = slice(data.rank * B // data.size, (data.rank + 1) * B // data.size)
    for step in range(steps):
        inputs, targets, weights = batch(step, runs[0].sae.W_enc.dtype)
        rows = ([x[share] for x in part] for part in (inputs, targets))
        reports = train_cross(runs, *rows, weights[share])
        if reports is not None:
            told.append([{name: getattr(report, name) for name in REPORTED} for report in reports])
    return told


def pack_all(runs: list[Run]) -> dict[str, torch.Tensor]:
    """The state of every layer, by its number and name."""
    return {
        f"{number}.{name}": tensor for number, run in enumerate(runs) for name, tensor in pack(run).items()
    }
