"""A training run, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext

from schemas.config import Config
from schemas.training import SaeIdentity
from store import ActivationStore
from store.console import Progress, human_bytes, say, section
from store.follow import Follower
from store.objects import ObjectStore, open_store
from store.order import LaneOrder
from trainer.checkpoint import save_checkpoint
from trainer.device import cpu_threads, resolve_device, stop_on_signals, torch_settings
from trainer.parallel import Launch, check_mesh, open_world
from trainer.publish import Summary, finished_summary, publish, put_summary
from trainer.sae import Sae
from trainer.start import begin, identity_of, plan_order, resolve_recipe, rows_of, stand, stream_state
from trainer.step import Run, StepReport, train_step
from trainer.telemetry import Record, Telemetry

AfterTrain = Callable[[Config, Sae, ActivationStore, str], dict[str, float]]
"""`after_train(config, sae, dataset, hook)` gives more figures for the summary."""


def train(config: Config, *, after_train: AfterTrain | None = None, launch: Launch | None = None) -> Summary:
    """Train one SAE, or go on from its newest checkpoint, and publish it in `train.out`.

    Args:
        config: `root`, `storage` and the section `train` are read.
        after_train: Measures what needs the subject model. Without it the summary names in `left_out`
            what is missing, and a later call that has it adds just that.
        launch: This process's place among those that train together; alone where not given.

    Returns:
        What `summary.json` holds. A run that is finished is not trained again.

    Raises:
        ConfigError: A spec that does not fit the dataset, or another run in `out`; nothing is written.
        NonFiniteError: Loss or gradient is NaN or infinite; the last checkpoint is kept.
        IntegrityError: Stored bytes are not what was promised.
        KeyboardInterrupt: SIGINT or SIGTERM came; a checkpoint was made.
    """
    spec, launch = section(config.train, "train"), launch or Launch()
    dataset = ActivationStore.open(
        config.root, config.storage, follow=spec.follow, timeout_seconds=spec.follow_seconds
    )
    order = plan_order(spec, dataset)
    recipe = resolve_recipe(spec, dataset, order)
    check_mesh(spec, launch.size)
    device = resolve_device(spec.device, launch.local_rank if launch.size > 1 else None)
    identity = identity_of(dataset)
    out = open_store(spec.out, config.storage)

    summary = finished_summary(out, spec, identity)
    if summary is not None:
        say(f"{spec.out} is finished: nothing to train")
    else:
        with torch_settings(device, cpu_threads(spec)), open_world(spec, device, launch) as world:
            run, telemetry, is_new = stand(recipe, dataset, order, identity, out, device, world)
            with world.together():
                out.probe(single_writer=True)  # can we write there? asked before hours of work
            with following(run, dataset, order) as follower:
                if run.counts.step < recipe.steps:
                    take_steps(run, telemetry, dataset, order, identity, out, is_new, follower)
                identity = identity_of(dataset)  # the dataset may have been sealed meanwhile
                summary = publish(run, telemetry, dataset, identity, out)
                if follower is not None:
                    follower.at(run.counts.step, finished=True)
    if after_train is not None and summary["left_out"] and launch.rank == 0:
        sae = Sae.load(spec.out, device=device, storage=config.storage)
        summary |= after_train(config, sae, dataset, spec.hook) | {"left_out": []}
        put_summary(out, summary)
    return summary


def following(
    run: Run, dataset: ActivationStore, order: LaneOrder
) -> AbstractContextManager[Follower | None]:
    """What tells a harvest how far this run is; nothing where the dataset is sealed."""
    spec = run.recipe.spec
    if dataset.arrivals is None or not run.world.leads:
        return nullcontext()
    return Follower(
        dataset.store,
        dataset.plan,
        order,
        out=spec.out,
        epochs=run.recipe.steps / order.steps_per_epoch,
        sample_steps=-(-spec.sample_rows // spec.batch_rows),
        step=run.counts.step,
    )


def take_steps(
    run: Run,
    telemetry: Telemetry,
    dataset: ActivationStore,
    order: LaneOrder,
    identity: SaeIdentity,
    out: ObjectStore,
    is_new: bool,
    follower: Follower | None = None,
) -> None:
    """Take every step that is left, with checkpoints on the way and one at the end."""
    recipe, spec, counts, world = run.recipe, run.recipe.spec, run.counts, run.world

    def checkpoint() -> float:
        telemetry.flush()  # first: lines past a checkpoint are cut on resume, missing ones never come
        state = stream_state(dataset, order, spec.read_hooks, counts.step)
        save_checkpoint(out, run, identity=identity, stream=state, threads=cpu_threads(spec))
        if follower is not None:
            follower.at(counts.step)
        return time.monotonic()

    stream = dataset.stream(
        spec.read_hooks,
        split="train",
        batch_rows=spec.batch_rows,
        seed=spec.seed,
        lanes=spec.lanes,
        group_units=order.group_units,
        rank=world.data.rank,
        world=world.data.size,
        start_step=counts.step,
        steps=recipe.steps,
    )
    bar = Progress("train", recipe.steps * spec.batch_rows, "rows", done=counts.step * spec.batch_rows)
    with closing(stream), stop_on_signals() as stopping, bar:
        say(
            f"{recipe.steps} steps of {spec.batch_rows} rows on {run.device}; {order.group_units} units are "
            f"shuffled together, {human_bytes(stream.memory_bytes)} of memory"
        )
        batches = begin(run, stream) if is_new else stream
        mark = last_checkpoint = time.monotonic()
        while counts.step < recipe.steps:
            asked = time.monotonic()
            with world.together():  # data that one rank cannot read stops all of them
                batch = next(batches)
            counts.seconds_waiting += time.monotonic() - asked
            rows, target = rows_of(batch, spec)
            wanted = () if target is None else (target.to(run.device),)
            report = train_step(run, rows.to(run.device), batch.weights.to(run.device), *wanted)
            now = time.monotonic()
            counts.seconds, mark = counts.seconds + now - mark, now

            last = counts.step == recipe.steps
            if report is not None and (last or counts.step % spec.log_every_steps == 0):
                record = make_record(run, report)
                telemetry.log(record)
                shown = {key: f"{record[key]:.3f}" for key in ("loss", "fvu", "l0", "dead_share")}
                bar.update(counts.step * spec.batch_rows, step=f"{counts.step}/{recipe.steps}", **shown)
            edge = follower is not None and order.locate(counts.step).step_in_group == 0
            is_time = now - last_checkpoint >= spec.checkpoint_seconds
            stop, due = world.any(stopping.is_set(), world.leads and (edge or is_time))
            if stop and not last:
                checkpoint()
                say(f"stopped after step {counts.step} of {recipe.steps}; a checkpoint is kept")
                raise KeyboardInterrupt
            if due or last:
                last_checkpoint = checkpoint()


def make_record(run: Run, report: StepReport) -> Record:
    """One line of telemetry."""
    counts = run.counts
    return {
        "step": counts.step,
        "epoch": round(counts.step / run.recipe.steps_per_epoch, 4),
        "tokens": counts.tokens,
        "loss": report.loss,
        "fvu": report.fvu,
        "l0": report.l0,
        "dead_share": report.dead / run.recipe.spec.latents,
        "auxk": report.auxk,
        "auxk_steps": counts.auxk_steps,
        "auxk_nonfinite_steps": counts.auxk_nonfinite,
        "grad_norm": report.grad_norm,
        "lr": report.lr,
        "tokens_per_s": counts.tokens / counts.seconds if counts.seconds else 0.0,
        "seconds": counts.seconds,
        "seconds_waiting_for_data": counts.seconds_waiting,
    }
