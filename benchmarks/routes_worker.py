"""One process of `benchmarks.routes`: runs of this checkout or of an older one, whose code is on sys.path.

    python benchmarks/routes_worker.py digests            # one JSON line: a digest per case
    python benchmarks/routes_worker.py clock SIZE THREADS  # reads a case per line, answers with its seconds
    python benchmarks/routes_worker.py mesh FOLDER RANK    # one of four ranks; one JSON line

It uses only names that both versions have, so that the same file measures both.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

MODULES = {
    "training": ("winnow.schemas.training", "schemas.training"),
    "step": ("winnow.trainer.step", "trainer.step"),
    "sae": ("winnow.sae.model", "winnow.trainer.sae", "trainer.sae"),
    "init": ("winnow.sae.init", "winnow.trainer.init", "trainer.init"),
    "checkpoint": ("winnow.trainer.run.checkpoint", "winnow.trainer.checkpoint", "trainer.checkpoint"),
    "shard": ("winnow.trainer.mesh.shard", "trainer.mesh.shard", "trainer.checkpoint"),
    "world": ("winnow.trainer.mesh.world", "trainer.mesh.world", "trainer.parallel"),
}
"""Where a module is, newest address first."""


sys.meta_path[:] = [
    finder for finder in sys.meta_path if not getattr(finder, "__module__", "").startswith("__editable__")
]
"""An editable install would give an older checkout this one's modules wherever it has none of a name."""


def load(name: str) -> ModuleType:
    """A module of the checkout on sys.path, at whichever address that version has it."""
    for address in MODULES[name]:
        try:
            return importlib.import_module(address)
        except ModuleNotFoundError as error:
            if not address.startswith(error.name or "?"):
                raise
    raise ModuleNotFoundError(name)


VARIANTS: dict[str, dict[str, Any]] = {
    "topk": {},
    "topk, without AuxK": {"auxk_coefficient": 0, "clip_norm": None, "ema": False},
    "clipped on every step": {"clip_norm": 1e-3},
    "all dead latents": {"auxk_k": 64},
    "one dead latent": {"auxk_k": 1},
    "multi": {"multi_topk": True},
    "K falls": {"k_start": 20, "multi_topk": True},
    "dataset": {"normalize": "dataset"},
    "none": {"normalize": "none"},
    "batchtopk": {"activation": "batchtopk"},
    "batchtopk in one group": {"activation": "batchtopk", "selection_groups": 1},
    "matryoshka": {"matryoshka": [7, 20, 50]},
    "matryoshka, batchtopk": {"matryoshka": [7, 20, 50], "activation": "batchtopk"},
    "transcoder": {"target_hook": "h.2"},
    "transcoder, skip, batchtopk": {"target_hook": "h.2", "skip": True, "activation": "batchtopk"},
    "transcoder, skip, matryoshka": {"target_hook": "h.2", "skip": True, "matryoshka": [30]},
    "transcoder, multi": {"target_hook": "h.2", "multi_topk": True, "target_normalize": "none"},
    "crosscoder": {"with_hooks": ["h.2"], "normalize": "dataset"},
    "relu": {"activation": "relu", "sparsity_warmup_fraction": 0.1},
    "jumprelu": {"activation": "jumprelu", "bandwidth": 0.3, "clip_norm": 0.01},
    "transcoder, skip, matryoshka, relu": {
        "target_hook": "h.2",
        "skip": True,
        "matryoshka": [7, 50],
        "activation": "relu",
    },
}
DENSE = ("relu", "jumprelu", "transcoder, skip, matryoshka, relu")
"""Variants whose codes are dense: the specification is their only route, and it takes no micro-batches."""
FLOAT32_ONLY: dict[str, dict[str, Any]] = {
    "bfloat16": {"compute_dtype": "bfloat16"},
    "bfloat16, batchtopk": {"compute_dtype": "bfloat16", "activation": "batchtopk"},
    "moments in int8": {"moments": "int8"},
    "moments in bfloat16": {"moments": "bfloat16"},
}


class Shape:
    """Sizes of runs: rows B, width D, latents N, active latents K, target's width O."""

    def __init__(self, rows: int, width: int, latents: int, k: int, out: int) -> None:
        self.rows, self.width, self.latents, self.k, self.out = rows, width, latents, k, out


SMALL = Shape(192, 12, 81, 4, 7)
LARGE = Shape(640, 96, 9000, 16, 40)
"""Many blocks of latents (2 MiB each on the CPU) and more than one tile of the encoder's product."""


def spec_of(shape: Shape, fields: dict[str, Any]) -> Any:
    """A spec under which AuxK has work from the third step on."""
    base: dict[str, Any] = {"out": "x", "hook": "h.1", "latents": shape.latents, "k": shape.k}
    base |= {"batch_rows": 192, "epochs": 8, "dead_after_tokens": 300, "auxk_k": 6, "lr": 0.003}
    return load("training").TrainSpec.model_validate(base | fields)


def draw(seed: int, rows: int, width: int) -> torch.Tensor:
    """Rows [B, D] in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64) * 3 + 1


def target_of(spec: Any, shape: Shape, rows: torch.Tensor) -> torch.Tensor | None:
    """A transcoder's target: something of the rows, and not linear."""
    return rows[:, : shape.out].relu() + rows[:, -shape.out :] if spec.target_hook else None


def make(shape: Shape, dtype: torch.dtype, fields: dict[str, Any], world: Any = None) -> Any:
    """A run before its first step, or this rank's shard of it."""
    spec, sae_of = spec_of(shape, fields), load("sae").Sae
    widths = {"h.1": shape.width - 5, "h.2": 5} if spec.with_hooks else {"h.1": shape.width, "h.2": shape.out}
    parts = spec.parts(widths)
    whole = sae_of(shape.width, shape.latents, spec.k, spec.normalize, parts, dtype=dtype)
    sample = draw(99, 500, shape.width).to(dtype)
    target = target_of(spec, shape, sample)
    constant = load("init").initialise(whole, sample, torch.ones(500, dtype=dtype), seed=0, target=target)
    with torch.no_grad():
        silent = whole.b_enc[: shape.latents // 5]  # so that AuxK has work
        raw = "none" in (spec.normalize, spec.target_normalize if spec.target_hook else None)
        silent[:] = -30.0 if raw else -1.0 if spec.target_hook else -0.3
    step = load("step")
    recipe = step.Recipe.resolve(spec, shape.width, steps_per_epoch=5)
    if world is None:
        return step.Run(whole, recipe, constant)
    has_latents, part = load("shard").has_latents, world.part(shape.latents)
    sae = sae_of(shape.width, len(part), spec.k, spec.normalize, parts, dtype=dtype)
    tensors = whole.tensors()
    sae.fill({n: t[part.start : part.stop] if has_latents(n, t) else t for n, t in tensors.items()})
    return step.Run(sae, recipe, constant, world)


def batch(shape: Shape, dtype: torch.dtype, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and weights: some rows weigh nothing or half; in step 4 a whole half; in step 5 all."""
    rows, weights = draw(step, shape.rows, shape.width), torch.ones(shape.rows, dtype=torch.float64)
    weights[1::5] *= 0.5
    weights[step::9] = 0
    if step == 4:
        weights[: shape.rows // 2] = 0
    if step == 5:
        weights[:] = 0
    rows[weights == 0] = torch.nan
    return rows.to(dtype), weights.to(dtype)


REPORTED = ("loss", "auxk", "grad_norm", "lr", "dead", "fvu", "l0", "rows")


def take_steps(
    run: Any, shape: Shape, dtype: torch.dtype, steps: int, world: Any = None
) -> list[list[float]]:
    """Take steps on this rank's share of each batch; what each reported."""
    train_step = load("step").train_step
    place, size = (world.data.rank, world.data.size) if world else (0, 1)
    share = slice(place * shape.rows // size, (place + 1) * shape.rows // size)
    told = []
    for step in range(steps):
        rows, weights = batch(shape, dtype, step)
        target = target_of(run.recipe.spec, shape, rows)
        given = None if target is None else target[share]
        report = train_step(run, rows[share].clone(), weights[share], given)
        if report is not None:
            told.append([float(getattr(report, name)) for name in REPORTED])
    return told


def digests() -> dict[str, str]:
    """By case: sha256 over the packed state after the steps and everything reported on the way."""
    found = {}
    for size, shape, steps in (("small", SMALL, 10), ("large", LARGE, 4)):
        for name, fields in (VARIANTS | FLOAT32_ONLY).items():
            for kernels in ("cpu", "eager"):
                if (kernels == "cpu") == (name in DENSE) or (kernels == "eager" and name in FLOAT32_ONLY):
                    continue
                for accumulate in (1, 2, 3) if kernels == "cpu" else (1,):
                    if accumulate == 3 and "batchtopk" in name:
                        accumulate = 4  # 3 cannot divide its groups
                    if accumulate > 1 and name.startswith("batchtopk in one"):
                        continue
                    case = {"kernels": kernels, "accumulate": accumulate} | fields
                    run = make(shape, torch.float32, case)
                    found[f"{size}, {name}, {kernels}, {accumulate}"] = digest(run, shape, steps)
    return found


def digest(run: Any, shape: Shape, steps: int) -> str:
    """See `digests`."""
    told = take_steps(run, shape, torch.float32, steps)
    state = load("checkpoint").pack(run)
    total = hashlib.sha256(json.dumps(told).encode())
    for name in sorted(state):
        if not name.startswith("count.seconds"):
            total.update(name.encode() + state[name].flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


# ---- equality with the specification ---------------------------------------------------------------

MESHES = {"1x1": (1, 1, 0), "2x1": (2, 1, 0), "1x2": (1, 2, 2), "2x2": (2, 2, 0)}
"""(data, latent, first rank); a mesh of one is every rank's own, and the two of two work at one time."""
STEPS = 7


def worlds() -> dict[str, Any]:
    """This rank's meshes by name."""
    import torch.distributed as dist

    module, rank = load("world"), dist.get_rank()
    found = {"1x1": module.World()}

    def axis(members: list[list[int]]) -> Any:
        mine = module.Axis()
        for ranks in members:  # every rank makes every group
            group = dist.new_group(ranks)
            if rank in ranks:
                mine = module.Axis(group, ranks.index(rank), len(ranks))
        return mine

    for name, (data, latent, first) in MESHES.items():
        ranks = list(range(first, first + data * latent))
        if len(ranks) > 1:
            rows = [ranks[place * latent : (place + 1) * latent] for place in range(data)]
            columns = [list(column) for column in zip(*rows, strict=True)]
            world = module.World(axis(columns), axis(rows), axis([ranks]))
            if rank in ranks:
                found[name] = world
    return found


def mesh_cases(rank: int) -> list[tuple[str, str, dict[str, Any], str]]:
    """(mesh, variant, kernels and micro-batches, how gradients cross `data`): on each mesh in one order."""
    cases = []
    for mesh, (data, latent, first) in MESHES.items():
        for number, variant in enumerate(VARIANTS):
            mine = number % 4 == rank if mesh == "1x1" else first <= rank < first + data * latent
            if not mine:
                continue
            exchanges = ("rows", "dense") if data > 1 else ("auto",)
            if mesh != "1x1":
                cases.append((mesh, variant, {"kernels": "eager"}, "auto"))
            if variant in DENSE:
                continue
            cases += [(mesh, variant, {"kernels": "cpu"}, exchange) for exchange in exchanges]
            for accumulate in (2, 3):
                if "batchtopk" in variant:  # 3 does not divide its groups, nor anything the one group
                    accumulate = 2 * accumulate - 2
                if variant != "batchtopk in one group":
                    cases.append((mesh, variant, {"kernels": "cpu", "accumulate": accumulate}, "auto"))
    return cases


def deviations(folder: str, rank: int) -> dict[str, float]:
    """By case: how far this rank's end is from the specification's, over what float64 is allowed."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=4)
    meshes, expected, found = worlds(), {}, {}
    for mesh, variant, how, exchange in mesh_cases(rank):
        if variant not in expected:
            run = make(SMALL, torch.float64, VARIANTS[variant] | {"kernels": "eager"})
            told = take_steps(run, SMALL, torch.float64, STEPS)
            expected[variant] = told, load("checkpoint").pack(run)
            assert run.counts.auxk_steps or not run.recipe.spec.auxk_coefficient, variant
        world = meshes[mesh]
        world.exchange = exchange
        run = make(SMALL, torch.float64, VARIANTS[variant] | how, world)
        told = take_steps(run, SMALL, torch.float64, STEPS, world)
        worst = deviation(told, load("checkpoint").pack(run), expected[variant], world.part(SMALL.latents))
        found[f"{mesh}, {variant}, {how['kernels']}, {how.get('accumulate', 1)}, {exchange}"] = worst
    dist.barrier()
    dist.destroy_process_group()
    return found


def deviation(told: list[list[float]], state: dict[str, torch.Tensor], expected: Any, part: range) -> float:
    """The largest difference over 1e-9 + 1e-7 times the number expected (reports: over 1e-9 of it)."""
    has_latents = load("shard").has_latents
    reports = zip(torch.tensor(told).double(), torch.tensor(expected[0]).double(), strict=True)
    worst = max(_largest((a - b).abs() / (1e-12 + 1e-9 * b.abs())) for a, b in reports)
    for name, right in expected[1].items():
        right = right[part.start : part.stop] if has_latents(name, right) else right
        if right.numel() and not name.startswith("count.seconds"):
            apart = (state[name].double() - right.double()).abs()
            worst = max(worst, _largest(apart / (1e-9 + 1e-7 * right.double().abs())))
    return worst


def _largest(ratios: torch.Tensor) -> float:
    return ratios.nan_to_num(nan=torch.inf).max().item()  # Python's max passes over NaN


# ---- seconds of a step -----------------------------------------------------------------------------

SIZES = {
    "full": (4096, 576, 16384, 32),
    "quickstart": (2048, 576, 4096, 32),
    "tiny": (64, 24, 128, 4),
}
CLOCKED: dict[str, dict[str, Any]] = {
    "plain": {"auxk_coefficient": 0},
    "dead10": {},
    "many dead": {},
    "batchtopk": {"activation": "batchtopk"},
    "matryoshka": {"matryoshka": True},
    "accumulate 2": {"accumulate": 2},
}
"""In `dead10` and below a tenth of the latents is dead, in `many dead` nine tenths (AuxK on codes)."""


def timed_case(size: str, name: str, world: Any = None) -> Callable[[], object]:
    """One step in mid-training."""
    rows, width, latents, k = SIZES[size]
    fields = CLOCKED[name] | {"auxk_k": min(256, latents), "clip_norm": 1e-4, "kernels": "cpu"}
    fields |= {"dead_after_tokens": 10_000_000, "epochs": 10_000, "batch_rows": -(-rows // 64) * 64}
    if fields.get("matryoshka"):
        fields["matryoshka"] = [latents // 16, latents // 4]
    shape = Shape(rows, width, latents, k, width)
    run = make(shape, torch.float32, fields, world)
    x, weights = draw(2, rows, width).float(), torch.ones(rows)
    every = 10 if name != "many dead" else 1
    silent = torch.arange(0, latents, every) if every > 1 else torch.arange(latents // 10, latents)
    train_step = load("step").train_step

    def step() -> None:
        run.dead.since[silent] = run.recipe.dead_after  # whatever the last step woke
        train_step(run, x, weights)

    return step


def lone_mesh() -> Any:
    """A mesh of 1 x 1 over a real process group; an older version takes its mesh's routine on it."""
    import tempfile

    import torch.distributed as dist

    place = tempfile.mkdtemp() + "/meet"
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    world = load("world").lay_mesh("cpu", 1, 1)
    if "meshed" in vars(world):
        world.meshed = True
    return world


def clock(size: str, threads: int) -> None:
    """Answer each case read from stdin with the wall and CPU seconds of one step, from its second on."""
    torch.set_num_threads(threads)
    gc.disable()  # a collection in mid-round is nobody's cost
    cases: dict[str, Callable[[], object]] = {}
    world = None
    for line in sys.stdin:
        name = line.strip()
        if name not in cases:
            meshed = name.startswith("mesh ")
            world = (world or lone_mesh()) if meshed else world
            cases[name] = timed_case(size, name.removeprefix("mesh "), world if meshed else None)
            cases[name]()  # Adam's and the average's state come with the first step
        wall, cpu = time.perf_counter(), time.process_time()
        cases[name]()
        print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]), flush=True)


def main() -> None:
    """See the module's docstring."""
    kind, *rest = sys.argv[1:]
    if kind == "digests":
        torch.set_num_threads(1)
        print(json.dumps(digests()))
    elif kind == "mesh":
        torch.set_num_threads(1)
        print(json.dumps(deviations(rest[0], int(rest[1]))))
    elif kind == "clock":
        clock(rest[0], int(rest[1]))


if __name__ == "__main__":
    main()
