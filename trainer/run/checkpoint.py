"""What a checkpoint holds: the state of a run as named tensors, and back; which runs may resume from it.

Storage is in `winnow.trainer.run.checkpoint_files`.
"""

from __future__ import annotations

from dataclasses import asdict, fields

import torch
from torch import Tensor

from winnow.schemas.errors import ConfigError, IntegrityError
from winnow.schemas.training import SaeIdentity, TrainSpec
from winnow.trainer.step import Counts, Run, SetRun
from winnow.trainer.step.moments import BYTES

_FREE_FIELDS = {"out", "device", "threads", "checkpoint_seconds", "checkpoints_kept", "log_every_steps"}
_FREE_FIELDS |= {"follow", "follow_seconds", "mesh", "tensorboard", "wandb", "accumulate"}
# the location of datasets, which are compared by their digests
_FREE_FIELDS |= {"roots"}
"""Spec fields that may change between a run and its resume; `device`, `threads` and `accumulate` change float
noise only."""


def differing_fields(before: TrainSpec, now: TrainSpec) -> list[str]:
    """List `field: before -> now` for each field that decides a run's result and differs."""
    old, new = before.model_dump(), now.model_dump()
    # some fields are left out of the dump while they have their default
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in old | new
        if key not in _FREE_FIELDS and old.get(key) != new.get(key)
    ]


def require_same_run(spec: TrainSpec, identity: SaeIdentity, now: TrainSpec, dataset: SaeIdentity) -> None:
    """Refuse to resume with another spec or dataset than `out` holds: ConfigError with the differences."""
    differing = differing_fields(spec, now)
    # a run that followed a harvest began before the dataset had a digest: what is unknown is no difference
    # `roots` is left out: the fields for all of them together say as much
    old, new = identity.model_dump(exclude={"roots"}), dataset.model_dump(exclude={"roots"})
    differing += [
        f"{key}: {old[key]} -> {new[key]}"
        for key in old
        if old[key] != new[key] and None not in (old[key], new[key])
    ]
    if differing:
        raise ConfigError(
            f"{now.out} holds a run of another spec or dataset",
            expected="the same fields",
            got="; ".join(differing),
            fix="Restore these fields, or train into another `out`",
        )


def least_bytes(run: Run | SetRun) -> int:
    """The bytes that a checkpoint of this rank's shard takes at least: weights, both moments, the average."""
    total = 0
    for part in run.parts.values():
        weights = sum(tensor.nbytes for tensor in part.sae.tensors().values())
        moments = 2 * weights * BYTES[part.recipe.spec.moments] // BYTES["float32"]
        total += weights + moments + (weights if part.ema is not None else 0)
    return total


# ---- state to tensors and back -------------------------------------------------------------------


def pack(run: Run | SetRun) -> dict[str, Tensor]:
    """Copy every tensor and number of a run by name to the CPU; on a mesh, those of this rank's shard."""
    return {
        f"{prefix}{name}": tensor
        for prefix, part in run.parts.items()
        for name, tensor in _pack_one(part).items()
    }


def _pack_one(run: Run) -> dict[str, Tensor]:
    tensors = {f"sae.{name}": tensor for name, tensor in run.sae.tensors().items()}
    for name in run.sae.parameter_names:
        state = run.adam.state.get(getattr(run.sae, name))
        for key, tensor in (state or {}).items():
            tensors[f"adam.{name}.{key}"] = tensor
    if run.ema is not None:
        tensors |= {f"ema.{name}": tensor for name, tensor in run.ema.sums.items()}
        tensors["ema.steps"] = torch.tensor(run.ema.steps)
    tensors["dead.since"] = run.dead.since
    tensors["loss_constant"] = torch.tensor(run.loss_constant, dtype=torch.float64)
    for name, number in asdict(run.counts).items():
        # torch's default for a Python float is float32, which would round it at each resume
        kind = torch.float64 if isinstance(number, float) else torch.int64
        tensors[f"count.{name}"] = torch.tensor(number, dtype=kind)
    # `copy=True` because the next step changes the weights while a thread still writes these
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def unpack(run: Run | SetRun, tensors: dict[str, Tensor]) -> None:
    """Put the tensors of `pack` back into a new run of the same recipe.

    Raises:
        IntegrityError: Names or shapes do not fit this run.
    """
    for prefix, part in run.parts.items():
        _unpack_one(part, _below(prefix, tensors))


def _unpack_one(run: Run, tensors: dict[str, Tensor]) -> None:
    try:
        run.sae.fill(_below("sae.", tensors))
        for name in run.sae.parameter_names:
            # Adam makes its moments at the first step, so a checkpoint of step 0 has none
            if state := _below(f"adam.{name}.", tensors):
                parameter = getattr(run.sae, name)
                run.adam.state[parameter] = {key: tensor.to(run.device) for key, tensor in state.items()}
        if run.ema is not None:
            for name, total in run.ema.sums.items():
                total.copy_(tensors[f"ema.{name}"])
            run.ema.steps = int(tensors["ema.steps"])
        run.dead.since.copy_(tensors["dead.since"])
        run.loss_constant = float(tensors["loss_constant"])
        numbers = {field.name: tensors[f"count.{field.name}"].item() for field in fields(Counts)}
        run.counts = Counts(**numbers)  # pyright: ignore[reportArgumentType]
    except (KeyError, RuntimeError) as error:
        raise IntegrityError("the checkpoint does not fit this run", got=error) from error


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
