"""Checkpoints: the whole state of a run as safetensors, and a JSON index that makes it count.

::

    <out>/checkpoints/<step>/state.safetensors   every tensor and number of the run
    <out>/checkpoints/<step>/index.json          CheckpointIndex: create-only, written last

A checkpoint is its index: data without one was never finished, or is being deleted (index first), and
is never chosen. The newest whose bytes match its index is taken; a damaged one is skipped with a
warning.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, fields
from datetime import UTC, datetime

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from schemas.base import sha256_hex
from schemas.errors import ConfigError, IntegrityError, MissingObject
from schemas.training import CheckpointIndex, SaeIdentity, StreamState, TrainSpec
from store.objects import ObjectStore
from trainer.step import Counts, Run

FREE_FIELDS = {"out", "device", "threads", "checkpoint_seconds", "checkpoints_kept", "log_every_steps"}
FREE_FIELDS |= {"follow", "follow_seconds", "mesh"}
"""Spec fields that may change between a run and its resume; `device` and `threads` move float noise."""
STATE = "state.safetensors"
LARGEST_STATE_BYTES = 1 << 40
"""A state file longer than this is refused unread."""
_PLACE = re.compile(r"^checkpoints/(\d{12})/(.+)$")


def differing_fields(before: TrainSpec, now: TrainSpec) -> list[str]:
    """`field: was -> is` for each field that decides a run's result and differs."""
    old, new = before.model_dump(), now.model_dump()
    return [
        f"{key}: {old[key]!r} -> {new[key]!r}"
        for key in old
        if key not in FREE_FIELDS and old[key] != new[key]
    ]


def require_same_run(spec: TrainSpec, identity: SaeIdentity, now: TrainSpec, dataset: SaeIdentity) -> None:
    """Refuse to go on with another spec or dataset than `out` holds: ConfigError with the differences."""
    differing = differing_fields(spec, now)
    old, new = identity.model_dump(), dataset.model_dump()
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


# ---- state to tensors and back -------------------------------------------------------------------


def pack(run: Run) -> dict[str, Tensor]:
    """Every tensor and number of a run by name, on the CPU."""
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
        kind = torch.float64 if isinstance(number, float) else torch.int64
        tensors[f"count.{name}"] = torch.tensor(number, dtype=kind)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def unpack(run: Run, tensors: dict[str, Tensor]) -> None:
    """Put the tensors of `pack` back into a new run of the same recipe.

    Raises:
        IntegrityError: Names or shapes that do not belong to this run.
    """
    try:
        run.sae.fill(_below("sae.", tensors))
        for name in run.sae.parameter_names:
            if state := _below(f"adam.{name}.", tensors):  # none before the first step
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


# ---- storage -------------------------------------------------------------------------------------


def save_checkpoint(
    out: ObjectStore,
    run: Run,
    *,
    identity: SaeIdentity,
    stream: StreamState,
    threads: int,
) -> CheckpointIndex:
    """Make a checkpoint of the run as it stands, then delete all but the newest `checkpoints_kept`."""
    folder = f"checkpoints/{run.counts.step:012d}"
    data = safetensors.torch.save(pack(run))
    index = CheckpointIndex(
        step=run.counts.step,
        spec=run.recipe.spec,
        identity=identity,
        stream=stream,
        files={STATE: sha256_hex(data)},
        threads=threads,
        device=str(run.device),
        tokens=run.counts.tokens,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if out.size(f"{folder}/index.json") is not None:  # a damaged one that a resume stepped over
        out.delete(f"{folder}/index.json")
    out.put(f"{folder}/{STATE}", data)
    out.put_new(f"{folder}/index.json", index.to_json())
    _prune(out, run.counts.step, run.recipe.spec.checkpoints_kept)
    return index


def _prune(out: ObjectStore, step: int, keep: int) -> None:
    """Delete all but the newest `keep` up to `step`; later ones are damaged, since a resume passed them."""
    places = _list(out)
    complete = sorted(
        (at for at, names in places.items() if "index.json" in names and at <= step), reverse=True
    )
    for step in sorted(set(places) - set(complete[:keep])):
        for name in sorted(places[step], key=lambda name: name != "index.json"):  # the index first
            out.delete(f"checkpoints/{step:012d}/{name}")


def _list(out: ObjectStore) -> dict[int, list[str]]:
    places: dict[int, list[str]] = {}
    for key, _ in out.list("checkpoints"):
        if match := _PLACE.match(key):
            places.setdefault(int(match[1]), []).append(match[2])
    return places


def newest_checkpoint(
    out: ObjectStore, warn: Callable[[str], None]
) -> tuple[CheckpointIndex, dict[str, Tensor]] | None:
    """The newest whole checkpoint and its tensors; None where the run has none yet.

    Args:
        out: The run's folder.
        warn: Told of every damaged checkpoint that is stepped over.

    Raises:
        IntegrityError: There are checkpoints, and all of them are damaged.
    """
    steps = sorted((step for step, names in _list(out).items() if "index.json" in names), reverse=True)
    for step in steps:
        folder = f"checkpoints/{step:012d}"
        try:
            return _read(out, folder)
        except (IntegrityError, MissingObject) as error:
            warn(f"warning: checkpoint {step} is damaged and is stepped over: {error}")
    if steps:
        raise IntegrityError(
            f"every checkpoint below {out.uri} is damaged",
            got=f"steps {steps}",
            fix="Delete the folder `checkpoints` to train from the start",
        )
    return None


def _read(out: ObjectStore, folder: str) -> tuple[CheckpointIndex, dict[str, Tensor]]:
    index = CheckpointIndex.from_json(out.get(f"{folder}/index.json"), origin=f"{folder}/index.json")
    if set(index.files) != {STATE}:
        raise IntegrityError(f"{folder}/index.json", expected=f"one file, {STATE}", got=sorted(index.files))
    data = out.get(f"{folder}/{STATE}", limit=LARGEST_STATE_BYTES)
    if sha256_hex(data) != index.files[STATE]:
        raise IntegrityError(
            f"{folder}/{STATE}", expected=f"sha256 {index.files[STATE]}", got=sha256_hex(data)
        )
    try:
        return index, safetensors.torch.load(data)
    except SafetensorError as error:
        raise IntegrityError(f"{folder}/{STATE} is not safetensors", got=error) from error
