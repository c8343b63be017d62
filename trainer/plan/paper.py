"""A training step on paper: a real step of a spec, at full size, on a GPU that need not be there.

Legend: B rows of a rank, D d_model, N latents of this rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from winnow.sae.model import Sae
from winnow.schemas.harvest import Dtype, stored_width
from winnow.schemas.training import TrainSpec
from winnow.trainer.mesh.world import Axis, Pending, World
from winnow.trainer.plan.answers import Answers
from winnow.trainer.plan.ledger import Entry, Ledger, Site
from winnow.trainer.plan.no_triton import importable_kernels
from winnow.trainer.step import Recipe, Run, SetRun, train_set, train_step

_CUDA, _CPU = torch.device("cuda", 0), torch.device("cpu")
HELD = ("weights", "gradients", "moments", "average", "counts")
"""What is held between steps."""


class Paper(NamedTuple):
    """What a step costs one GPU."""

    entries: dict[Site, Entry]
    held: dict[str, int]
    """Bytes between steps: weights, gradients, moments, average, counts."""
    peak: int
    """Most bytes at a time, batches included."""
    peak_at: str
    sent: dict[str, int]
    """Bytes sent over each axis of the mesh."""
    runs: int
    """Times that a step as told of is taken, one after the other: layers of a per-layer set."""


class _PaperAxis(Axis):
    """An axis whose other ranks do as this one does, and nothing is sent."""

    def sum_start(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Pending:
        """See `Axis`."""
        self.bytes_sent += 2 * (self.size - 1) * tensor.nbytes // self.size
        if op == dist.ReduceOp.SUM and tensor.device.type == "cpu":
            tensor.mul_(self.size)
        return Pending(tensor)

    def gather_start(self, tensor: Tensor) -> Pending:
        """See `Axis`."""
        self.bytes_sent += (self.size - 1) * tensor.nbytes
        out = tensor.new_empty(self.size, *tensor.shape)
        return Pending(out.copy_(tensor) if tensor.device.type == "cpu" else out)


class _Batches:
    """The rows of a step on the device, and those of the next one, which arrive meanwhile."""

    def __init__(self, spec: TrainSpec, d_model: int, rows: int, stored: Dtype, device: torch.device) -> None:
        hooks = spec.stream_hooks
        self.weights = torch.empty(rows, device=device)
        # with micro-batches rows wait on the host, and each part is moved by the step
        whole = spec.accumulate == 1
        width, kind = stored_width(stored, d_model), getattr(torch, stored)
        self.rows = {
            hook: torch.empty(rows, width, dtype=kind, device=device)
            if whole
            else torch.empty(1, 1, dtype=kind).expand(rows, width)
            for hook in hooks
        }
        self.ahead = [torch.empty_like(part) for part in self.rows.values()] if whole else []

    def take(self, run: Run | SetRun) -> None:
        """Take a step."""
        if isinstance(run, SetRun):
            train_set(run, self.rows, self.weights)
        else:
            spec = run.recipe.spec
            target = None if spec.target_hook is None else self.rows[spec.target_hook]
            train_step(run, self.rows[spec.hook], self.weights, target)


def step_on_paper(
    spec: TrainSpec,
    d_model: int,
    *,
    data: int = 1,
    latent: int = 1,
    dead_share: float = 0.0,
    stored: Dtype = "bfloat16",
) -> Paper:
    """Take a step of a spec and tell what it costs one GPU.

    Args:
        spec: What is trained.
        d_model: D; a transcoder's target is as wide.
        data: Data ranks of the mesh.
        latent: Latent shards of the mesh.
        dead_share: Share of the latents that are dead in this step.
        stored: Type of the dataset, in which rows reach a GPU.
    """
    world = _world(data, latent, spec.latents)
    answers = Answers(
        dead=int(dead_share * len(world.part(spec.latents))),
        k=spec.k_start or spec.k,
        shards=latent,
        batched=spec.traits.selects == "batch",
        clip_norm=spec.clip_norm,
    )
    # the step by autograd is that of a GPU too, but without one the engine follows no fake of it
    device = _CUDA if _has_kernels(spec) else _CPU
    ledger, axes = Ledger(answers, device), {"data": world.data, "latent": world.latent}
    with importable_kernels(), ledger.kept():
        run = _run(spec, d_model, world, device)
        # gradients and moments are made in the first step, for which few rows are enough
        _Batches(spec, d_model, spec.lanes * spec.accumulate, stored, device).take(run)
        batches = _Batches(spec, d_model, spec.batch_rows // data, stored, device)
        before = {name: axis.bytes_sent for name, axis in axes.items()}
        ledger.restart()
        batches.take(run)
        ledger.end()
        sent = {name: axis.bytes_sent - before[name] for name, axis in axes.items()}
        held = {name: sum(map(_nbytes, tensors)) for name, tensors in _standing(run).items()}
    # the layers of a per-layer set stand together, but take their steps one after another
    times = 1 if spec.set is None or spec.set.cross else len(spec.set.range)
    peak = ledger.peak + (times - 1) * sum(held.values())
    held = {name: times * size for name, size in held.items()}
    return Paper(ledger.entries, held, peak, ledger.peak_at, sent, times)


def _world(data: int, latent: int, latents: int) -> World:
    """A rank of a mesh that holds one of the largest shards of N latents."""
    if data * latent == 1:
        return World()
    sizes = [len(part) for part in World(latent=_PaperAxis(None, 0, latent)).parts(latents)]
    return World(_PaperAxis(None, 0, data), _PaperAxis(None, sizes.index(max(sizes)), latent))


def _run(spec: TrainSpec, d_model: int, world: World, device: torch.device) -> Run | SetRun:
    """The run of a spec; of a per-layer set, that of its first layer."""
    # long enough that no learning rate, K or average is that of an end
    recipe = Recipe.resolve(spec.model_copy(update={"epochs": 1e6}), d_model, steps_per_epoch=1)
    if spec.set is None:
        return _layer(recipe, d_model, world, device)
    layers = spec.set.range if spec.set.cross else [spec.set.first]
    recipes = {layer: replace(recipe, spec=recipe.spec.layer_spec(layer)) for layer in layers}
    runs = {layer: _layer(own, d_model, world, device) for layer, own in recipes.items()}
    return SetRun(recipe, runs) if spec.set.cross else runs[spec.set.first]


def _layer(recipe: Recipe, d_model: int, world: World, device: torch.device) -> Run:
    spec = recipe.spec
    widths = dict.fromkeys(spec.read_hooks, d_model)
    parts, held = spec.parts(widths), len(world.part(spec.latents))
    sae = Sae(d_model, held, min(spec.k, held), spec.normalize, parts, device=device)
    # the kernels of a GPU, also where none could run: nothing is computed
    return Run(sae, recipe, 1.0, world, kernels="triton" if _has_kernels(spec) else "eager")


def _has_kernels(spec: TrainSpec) -> bool:
    return bool(spec.traits.selects) and spec.kernels != "eager"


def _standing(run: Run | SetRun) -> dict[str, list[Tensor]]:
    """What is held between steps, by what it is."""
    found: dict[str, list[Tensor]] = {name: [] for name in HELD}
    for part in run.parts.values():
        parameters = [getattr(part.sae, name) for name in part.sae.parameter_names]
        found["weights"] += parameters
        found["gradients"] += [p.grad for p in parameters if p.grad is not None]
        states = [part.adam.state[p].items() for p in parameters]
        found["moments"] += [t for state in states for name, t in state if name != "step"]
        found["average"] += list(part.ema.sums.values()) if part.ema is not None else []
        found["counts"].append(part.dead.since)
    return found


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
