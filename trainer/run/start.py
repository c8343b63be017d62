"""Before the first step: whether the spec fits the dataset, and the state that the run starts from."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from winnow.common.device import cpu_threads
from winnow.common.reporter import say
from winnow.sae.init import initialise
from winnow.sae.model import Sae
from winnow.schemas.errors import ConfigError
from winnow.schemas.fit import require_hooks
from winnow.schemas.layers import WRITES, SetSpec
from winnow.schemas.stream import StreamState
from winnow.schemas.training import SaeIdentity, TrainSpec
from winnow.store import ActivationStore
from winnow.store.format.order import LaneOrder, group_units_for
from winnow.store.objects import ObjectStore
from winnow.store.read.joined import JoinedStore
from winnow.store.read.torch_stream import Batch
from winnow.trainer.mesh.rows import SharedRows
from winnow.trainer.mesh.world import World
from winnow.trainer.run.checkpoint import require_same_run, unpack
from winnow.trainer.run.checkpoint_files import newest_checkpoint
from winnow.trainer.run.telemetry import Telemetry
from winnow.trainer.run.warm_start import warm_start
from winnow.trainer.step import Recipe, Run, SetRun
from winnow.trainer.step.cross_init import initialise_cross
from winnow.trainer.step.optim import Ema
from winnow.trainer.step.widen import widened

log = logging.getLogger("winnow.trainer")


def plan_order(spec: TrainSpec, dataset: ActivationStore) -> LaneOrder:
    """Plan the order of the rows; ConfigError if hook, batch, lanes or groups do not fit the dataset."""
    plan = dataset.plan
    # only for its error: a hook that the plan lacks is named before anything else can fail
    for hook in () if spec.set is not None else spec.stream_hooks:
        plan.d_model(hook)
    if spec.set is not None:
        require_hooks("train.set", spec.set.hooks, plan, instead=_other_layers(spec.set, plan.spec.hooks))
    unit_bytes = sum(plan.shard_bytes(hook) for hook in spec.stream_hooks)
    units = spec.group_units or group_units_for(
        spec.group_bytes, unit_bytes=unit_bytes, units=len(plan.split_units("train"))
    )
    return dataset.only(spec.rows).order(
        batch_rows=spec.batch_rows, seed=spec.stream_seed, lanes=spec.lanes, group_units=units
    )


def _other_layers(of: SetSpec, hooks: Sequence[str]) -> str:
    """How to train the first layers in a row of which a dataset has the hooks; empty if it has none."""
    held = [layer for layer in of.range if {of.read_hook(layer), f"{WRITES}.{layer}"} <= set(hooks)]
    row = [layer for place, layer in enumerate(held) if layer - place == held[0]]
    return (
        f"To train the layers that are there, set train.set.layers to [{row[0]}, {row[-1]}]. " if row else ""
    )


def resolve_recipe(spec: TrainSpec, dataset: ActivationStore, order: LaneOrder) -> Recipe:
    """Resolve the spec's null fields for a dataset; ConfigError if the two disagree."""
    d_model = sum(dataset.plan.d_model(hook) for hook in spec.input_hooks)
    if spec.set is not None:
        _require_one_width({hook: dataset.plan.d_model(hook) for hook in spec.set.hooks})
    recipe = Recipe.resolve(spec, d_model, order.steps_per_epoch)
    if recipe.steps < 1:
        least = f"at least {1 / order.steps_per_epoch:.3g}, which is one step"
        raise ConfigError("epochs", expected=least, got=spec.epochs)
    return recipe


def resolve_set(spec: TrainSpec, dataset: ActivationStore) -> TrainSpec:
    """The spec with a set's `layers: all` resolved for the dataset's subject; any other spec as it is.

    Raises:
        ConfigError: The subject has not all of the layers.
    """
    if spec.set is None:
        return spec
    of = spec.set.of(dataset.plan.subject.layers)
    return spec.model_copy(update={"set": of})


def _require_one_width(widths: Mapping[str, int]) -> None:
    if len(set(widths.values())) > 1:
        raise ConfigError("the widths D of a set's hooks", expected="one width", got=dict(widths))


def identity_of(dataset: ActivationStore) -> SaeIdentity:
    """The dataset and the subject that the SAE's weights will belong to."""
    joined = dataset.parts if isinstance(dataset, JoinedStore) else {}
    return SaeIdentity(
        plan_fingerprint=dataset.plan.fingerprint,
        dataset_sha256=dataset.dataset_sha256,
        subject_model=dataset.plan.subject.model,
        subject_weights_sha256=dataset.plan.subject.weights_sha256,
        derived=() if dataset.plan.derived is None else dataset.plan.derived.rules,
        roots={name: identity_of(part) for name, part in joined.items()},
    )


def stream_state(
    dataset: ActivationStore, order: LaneOrder, hooks: tuple[str, ...], step: int
) -> StreamState:
    """The position of the stream before a step."""
    return order.state(dataset.plan.fingerprint, "train", hooks, step)


def rows_of(rows: Mapping[str, Tensor], spec: TrainSpec) -> tuple[Tensor, Tensor | None]:
    """Raw or stored input rows [B, D], joined if there are several hooks, and a transcoder's target rows."""
    inputs = [rows[hook] for hook in spec.input_hooks]
    # widened before they are joined: packed int8 rows end with their scales
    joined = torch.cat([widened(part) for part in inputs], dim=1) if len(inputs) > 1 else inputs[0]
    return joined, rows[spec.target_hook] if spec.target_hook else None


def restore_or_create(
    recipe: Recipe,
    dataset: ActivationStore,
    order: LaneOrder,
    identity: SaeIdentity,
    out: ObjectStore,
    device: torch.device,
    *,
    world: World,
    extend: bool = False,
) -> tuple[Run | SetRun, Telemetry, bool]:
    """Load the newest checkpoint's state, or make a new one that `initialise_runs` must fill.

    Returns:
        The run, its telemetry, and whether it is new.

    Raises:
        ConfigError: `out` holds a run of another spec, dataset or order.
        IntegrityError: Every checkpoint is damaged.
    """
    spec = recipe.spec
    run = _new_run(recipe, dataset, device, world)
    found = newest_checkpoint(out, world)
    if found is None:
        return run, Telemetry(out), True
    index, tensors = found
    require_same_run(planned_as(index.spec, spec, extend), index.identity, spec, identity)
    now = stream_state(dataset, order, spec.stream_hooks, index.step)
    # with another order a resumed run would repeat some rows and never see others
    if index.stream != now:
        raise ConfigError("the order of the rows has changed", expected=index.stream, got=now)
    unpack(run, tensors)
    for part in run.parts.values() if spec.epochs > index.spec.epochs else ():
        # beta follows from the number of steps, and sums taken with another beta have another bias
        if part.ema is not None:
            part.ema = Ema(part.sae, part.ema.beta)
    threads = cpu_threads(spec)
    # a warning and not an error: the number of threads only changes the order of sums, thus the last bits
    if (index.threads, index.device) != (threads, str(run.device)):
        log.warning(
            "this run had %d threads on %s and now has %d on %s: the result is as good, but not "
            "bit-identical",
            index.threads,
            index.device,
            threads,
            run.device,
        )
    # named, since a sweep resumes several at once
    say(f"resuming from the checkpoint at step {index.step} of {recipe.steps}: {out.uri}")
    return run, Telemetry.resume(out, index.step), False


def _new_run(recipe: Recipe, dataset: ActivationStore, device: torch.device, world: World) -> Run | SetRun:
    """A run whose weights are 0, or those of a set's layers."""
    spec = recipe.spec
    if spec.set is not None:
        layers = {layer: replace(recipe, spec=spec.layer_spec(layer)) for layer in spec.set.range}
        return SetRun(recipe, {n: _new_layer(own, dataset, device, world) for n, own in layers.items()})
    return _new_layer(recipe, dataset, device, world)


def _new_layer(recipe: Recipe, dataset: ActivationStore, device: torch.device, world: World) -> Run:
    spec = recipe.spec
    widths = {hook: dataset.plan.d_model(hook) for hook in spec.read_hooks}
    d_model = sum(widths[hook] for hook in spec.input_hooks)
    held = len(world.part(spec.latents))
    sae = Sae(d_model, held, spec.k, spec.normalize, spec.parts(widths), device=device)
    return Run(sae, recipe, loss_constant=1.0, world=world)


def planned_as(before: TrainSpec, now: TrainSpec, extend: bool) -> TrainSpec:
    """The spec of an earlier run as it is compared with the present one.

    With `extend`, fewer epochs are not a difference: the run continues as if it had been planned with the new
    number. Learning rate, dead_after and the moving average's beta are those of the new number of steps,
    so a run that had begun to decay returns to its peak rate, and the average starts anew.

    Raises:
        ConfigError: More epochs than before, without `extend`.
    """
    if now.epochs <= before.epochs:
        return before
    if not extend:
        raise ConfigError(
            f"{now.out} holds a run of fewer epochs",
            expected=before.epochs,
            got=now.epochs,
            fix="Add --extend to continue it: its learning rate returns to that of the new schedule",
        )
    return before.model_copy(update={"epochs": now.epochs})


def initialise_runs(runs: Sequence[Run | SetRun], batches: SharedRows) -> None:
    """Initialise new runs, each from the first `sample_rows` rows of its stream."""
    specs = [run.recipe.spec for run in runs]
    needs = [
        min(-(-spec.sample_rows // spec.batch_rows), run.recipe.steps)
        for run, spec in zip(runs, specs, strict=True)
    ]
    # peeked, not taken: the first steps train on the same rows
    drawn = batches.peek(max(needs))
    for run, spec, need in zip(runs, specs, needs, strict=True):

        def sample(parts: Sequence[Tensor], run: Run | SetRun = run, size: int = spec.sample_rows) -> Tensor:
            # of the whole batch on every rank, so that all initialise with the same bits
            whole = [run.world.data.gather(widened(part)).flatten(0, 1) for part in parts]
            return torch.cat(whole)[:size].to(run.device)

        def rows(hook: str, some: Sequence[Batch] = drawn[:need]) -> Tensor:
            return sample([batch.rows[hook] for batch in some])

        weights = sample([batch.weights for batch in drawn[:need]])
        if isinstance(run, SetRun) and run.of.cross:
            inputs = [rows(run.of.read_hook(layer)) for layer in run.layers]
            targets = [rows(run.of.target_hooks(layer)[0]) for layer in run.layers]
            initialise_cross(list(run.layers.values()), inputs, targets, weights)
            continue
        for part in run.parts.values():
            own = part.recipe.spec
            _initialise_one(part, *rows_of({hook: rows(hook) for hook in own.read_hooks}, own), weights)


def _initialise_one(run: Run, x: Tensor, target: Tensor | None, weights: Tensor) -> None:
    """Initialise a run from raw rows [B, D], a transcoder's target rows, and their weights [B]."""
    spec, place = run.recipe.spec, run.shard.place
    if run.source is None:
        run.loss_constant = initialise(
            run.sae, x, weights, spec.seed, target, encoder_norm=spec.first_encoder_norm, place=place
        )
    else:
        run.loss_constant = warm_start(run.sae, run.source, x, weights, target, place=place)
        # a whole second SAE, not needed again
        run.source = None
