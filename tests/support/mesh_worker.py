"""One rank of several meshes of small runs in float64: `python -m tests.support.mesh_worker FOLDER RANK`.

Four ranks meet once and go through every case on 2 x 2 and 1 x 4, and as two pairs on 2 x 1 and 1 x 2.
Each writes what it ends with into FOLDER; `tests/integration/test_mesh.py` reads it.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist

from tests.support import cross
from winnow.sae.init import initialise
from winnow.sae.model import Sae
from winnow.schemas.training import TrainSpec
from winnow.trainer.mesh.shard import has_latents
from winnow.trainer.mesh.world import Axis, World
from winnow.trainer.run.checkpoint import pack
from winnow.trainer.step import Recipe, Run, train_step

B, D, N, K, OUT, STEPS = 96, 12, 81, 12, 7, 7
REPORTED = ("loss", "auxk", "grad_norm", "lr", "dead", "fvu", "l0", "rows")
CASES: dict[str, dict[str, Any]] = {
    "plain": {"auxk_coefficient": 0, "clip_norm": None, "ema": False},
    "everything": {},
    "rows": {},
    "dense": {},
    "multi": {"multi_topk": True},
    "clipped on every step": {"clip_norm": 1e-3},
    "all dead latents": {"auxk_k": 64},
    "one of them": {"auxk_k": 1},
    "multi at half of N": {"multi_topk": True, "k": N // 2},
    "every latent": {"k": N},
    "K falls": {"k_start": 30},
    "dataset": {"normalize": "dataset"},
    "none": {"normalize": "none"},
    "skewed": {},
    "ties": {"auxk_coefficient": 0, "normalize": "none"},
    "rows, batchtopk": {"activation": "batchtopk"},
    "rows, batchtopk in one group": {"activation": "batchtopk", "selection_groups": 1},
    "uneven": {"activation": "batchtopk", "k": 1, "normalize": "none", "selection_groups": 2},
    "ties, batchtopk": {"activation": "batchtopk", "auxk_coefficient": 0, "normalize": "none"},
    "ties, batchtopk in one group": {
        "activation": "batchtopk",
        "auxk_coefficient": 0,
        "normalize": "none",
        "selection_groups": 1,
    },
    "rows, matryoshka": {"matryoshka": [7, 41]},
    "rows, transcoder": {"target_hook": "h.2", "skip": True},
    "dense, transcoder": {"target_hook": "h.2", "skip": True},
    "relu": {"activation": "relu", "sparsity_warmup_fraction": 0.1},
    "jumprelu": {"activation": "jumprelu", "bandwidth": 0.3, "clip_norm": 0.01},
    "in parts": {"accumulate": 4, "multi_topk": True},
    "in parts, batchtopk": {"accumulate": 2, "activation": "batchtopk"},
    "batchtopk in small groups": {"activation": "batchtopk", "lanes": 32, "selection_groups": 32},
    "in parts, matryoshka": {"accumulate": 2, "matryoshka": [7, 41], "auxk_k": 64},
    "in parts, transcoder": {"accumulate": 8, "target_hook": "h.2", "skip": True},
    "matryoshka, batchtopk": {"matryoshka": [7, 20, 50], "activation": "batchtopk"},
    "transcoder, skip, batchtopk": {"target_hook": "h.2", "skip": True, "activation": "batchtopk"},
    "transcoder, skip, matryoshka": {"target_hook": "h.2", "skip": True, "matryoshka": [30]},
    "transcoder, multi": {"target_hook": "h.2", "multi_topk": True},
    "transcoder, skip, matryoshka, relu": {
        "target_hook": "h.2",
        "skip": True,
        "matryoshka": [7, 50],
        "activation": "relu",
    },
    "crosscoder": {"with_hooks": ["h.2"], "normalize": "dataset"},
    "bfloat16": {"compute_dtype": "bfloat16", "auxk_coefficient": 0, "multi_topk": True},
    "bfloat16, batchtopk": {
        "compute_dtype": "bfloat16",
        "auxk_coefficient": 0,
        "activation": "batchtopk",
    },
}
"""Where a case begins with the name of an exchange, that one is taken. In `skewed` one shard has all the
best. In `ties`, one step, latents stand there several times in small integers, so that equal means equal.
In `uneven` a few rows are so large that they take most of their group's quota. In `bfloat16` AuxK is off: its
dense products, which a mesh does not have, round its codes too."""
MIXED = tuple(CASES)[list(CASES).index("batchtopk in small groups") :]
"""Cases that go together from the others: on 2 x 2 only."""


def cases_on(mesh: str) -> list[str]:
    """The cases of a mesh."""
    return [case for case in CASES if mesh == "2x2" or case not in MIXED]


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [B, D] and weights [B]: some rows weigh nothing; in step 4 a whole half; in step 5 all."""
    draw = torch.Generator().manual_seed(step)
    rows = torch.randn(B, D, generator=draw, dtype=torch.float64) * 3 + 1
    weights = torch.ones(B, dtype=torch.float64)
    weights[step::9] = 0
    if step == 4:
        weights[: B // 2] = 0
    if step == 5:
        weights[:] = 0
    rows[weights == 0] = torch.nan
    return rows, weights


def target_of(spec: TrainSpec, rows: torch.Tensor) -> torch.Tensor | None:
    """A transcoder's target: something of the rows, and not linear."""
    return rows[:, :OUT].relu() + rows[:, -OUT:] if spec.target_hook else None


def make(case: str, world: World | None = None, kernels: str | None = None) -> Run:
    """The case's run before its first step, or this rank's shard of it.

    On a mesh by the sparse route where the case has one, alone by the specification, or as `kernels` says.
    """
    base: dict[str, Any] = {"out": "x", "hook": "h.1", "latents": N, "k": K, "batch_rows": 64, "epochs": 8}
    base |= {"dead_after_tokens": 150, "auxk_k": 6, "lr": 0.003}
    dense = CASES[case].get("activation") in ("relu", "jumprelu")
    half = "compute_dtype" in CASES[case]  # eager has no bfloat16, and leaves the choice among ties open
    fused = (world and not dense) or half or case == "ties"
    base |= {"kernels": kernels or ("cpu" if fused else "eager")} | CASES[case]
    spec = TrainSpec.model_validate(
        base if world else base | {"accumulate": 1}
    )  # the eager step has no parts
    parts = spec.parts({"h.1": D, "h.2": OUT} if spec.target_hook else {"h.1": D - 5, "h.2": 5})
    whole = Sae(D, N, spec.k, spec.normalize, parts, dtype=torch.float64)
    sample = torch.randn(500, D, generator=torch.Generator().manual_seed(99), dtype=torch.float64) * 3 + 1
    target = target_of(spec, sample)
    constant = initialise(whole, sample, torch.ones(500, dtype=torch.float64), seed=0, target=target)
    with torch.no_grad():
        whole.b_enc[: N // 5] = -30.0 if spec.normalize == "none" else -0.3  # silent, so that AuxK has work
        if case == "skewed":
            whole.b_enc[-N // 5 :] = 1.0
        if case.startswith("ties"):
            whole.b_pre.zero_()
            whole.b_enc.zero_()
            whole.W_enc.mul_(4).round_()
            whole.W_enc[N // 3 :] = whole.W_enc[: N - N // 3].clone()
    recipe = Recipe.resolve(spec, D, steps_per_epoch=5)
    if world is None:
        return Run(whole, recipe, constant)
    part = world.part(N)
    sae = Sae(D, len(part), spec.k, spec.normalize, parts, dtype=torch.float64)
    tensors = whole.tensors()
    for name, tensor in tensors.items():
        tensors[name] = tensor[part.start : part.stop] if has_latents(name, tensor) else tensor
    sae.fill(tensors)
    return Run(sae, recipe, constant, world)


def go(case: str, world: World | None, kernels: str | None = None) -> tuple[Run, list[dict[str, float]]]:
    """Take the steps; what each reported."""
    run = make(case, world, kernels)
    data = world.data if world else Axis()
    if world and case.split(",")[0] in ("rows", "dense"):
        world.exchange = "rows" if case.startswith("rows") else "dense"
    share = slice(data.rank * B // data.size, (data.rank + 1) * B // data.size)
    told = []
    for step in range(1 if case.startswith("ties") else STEPS):
        rows, weights = batch(step)
        rows = rows.round() if case.startswith("ties") else rows
        if case == "uneven":
            rows[::20] *= 300
        target = target_of(run.recipe.spec, rows)
        before = (world.data.bytes_sent, world.latent.bytes_sent) if world else (0, 0)
        wanted = None if target is None else target[share]
        report = train_step(run, rows[share].clone(), weights[share], wanted)
        after = (world.data.bytes_sent, world.latent.bytes_sent) if world else (0, 0)
        if report is not None:
            told.append({name: getattr(report, name) for name in REPORTED})
            told[-1] |= {"step": step, "second_rounds": report.second_rounds}
            told[-1] |= {"data_bytes": after[0] - before[0], "latent_bytes": after[1] - before[1]}
    if world:
        world.exchange = "auto"
    return run, told


def worlds() -> dict[str, World | None]:
    """This rank's meshes by name; None where it has no place in one."""
    rank, size = dist.get_rank(), dist.get_world_size()
    shapes = {"2x2": (2, 2, 0), "1x4": (1, 4, 0), "2x1": (2, 1, 0), "1x2": (1, 2, 2)}
    found: dict[str, World | None] = {}
    for name, (data, latent, first) in shapes.items():

        def axis(members: list[list[int]]) -> Axis:
            mine = Axis()
            for ranks in members:  # every rank makes every group
                group = dist.new_group(ranks)
                if rank in ranks:
                    mine = Axis(group, ranks.index(rank), len(ranks))  # pyright: ignore[reportArgumentType]
            return mine

        ranks = list(range(first, first + data * latent))
        rows = [ranks[place * latent : (place + 1) * latent] for place in range(data)]
        axes = axis([list(column) for column in zip(*rows, strict=True)]), axis(rows), axis([ranks])
        found[name] = World(*axes) if rank in ranks else None
    assert size == 4
    return found


def main(folder: Path, rank: int) -> None:
    """Go through all cases on all meshes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=4, timeout=timedelta(seconds=120)
    )
    for mesh, world in worlds().items():
        for case in cases_on(mesh) if world else ():
            assert world is not None
            run, told = go(case, world)
            name = f"{mesh} {case} {world.data.rank} {world.latent.rank}"
            safetensors.torch.save_file(pack(run), folder / f"{name}.safetensors")
            (folder / f"{name}.json").write_text(json.dumps(told))
        for case, fields in cross.CASES.items() if world else ():
            runs = cross.make_cross("cpu", world, **fields)
            told = cross.go_cross(runs)
            assert world is not None
            name = f"{mesh} cross, {case} {world.data.rank} {world.latent.rank}"
            safetensors.torch.save_file(cross.pack_all(runs), folder / f"{name}.safetensors")
            (folder / f"{name}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
