"""Training, top to bottom: one SAE or transcoder set, or a fleet of them fed by one pass over the stream.

SAEs with the same stream (hook, batch, lanes, groups and order seed) take their steps together: each batch
is read once and given to all. Every SAE has its own folder, checkpoints, telemetry and end, and its weights
have the same bits as if it had been trained alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from typing import NoReturn

import torch
from torch import Tensor

from winnow.common.device import cpu_threads, resolve_device, torch_settings
from winnow.common.figures import count_of, human_bytes
from winnow.common.reporter import Progress, say
from winnow.common.signals import stop_on_signals
from winnow.sae.model import Sae
from winnow.schemas.config import Config, section
from winnow.schemas.errors import ConfigError, NonFiniteError, WorkerError
from winnow.schemas.evaluation import LOSSES_KEY
from winnow.schemas.training import TrainSpec
from winnow.store import ActivationStore
from winnow.store.objects import ObjectStore, open_store
from winnow.store.read.joined import JoinedStore, open_roots
from winnow.store.read.torch_stream import Batch
from winnow.trainer.mesh.fit import check_mesh
from winnow.trainer.mesh.rows import SharedRows
from winnow.trainer.mesh.world import Launch, World, open_world
from winnow.trainer.run.member import Member
from winnow.trainer.run.publish import Summary, finished_summary, put_summary
from winnow.trainer.run.start import (
    identity_of,
    initialise_runs,
    plan_order,
    resolve_recipe,
    resolve_set,
)
from winnow.trainer.run.status import asked_to_stop
from winnow.trainer.run.telemetry import Record
from winnow.trainer.run.transfer import Transfer
from winnow.trainer.step import SetReport, StepReport
from winnow.trainer.step.spans import sampling

log = logging.getLogger("winnow.trainer")

Report = StepReport | SetReport
AfterTrain = Callable[[Config, Sae, ActivationStore, str, ObjectStore], dict[str, float]]
"""`after_train(config, sae, dataset, hook, out)` returns further figures for the summary. In the folder `out`
it may keep `LOSSES_KEY`, by which it resumes and which is removed after the summary is written."""


def train(
    config: Config,
    *,
    after_train: AfterTrain | None = None,
    extend: bool = False,
    launch: Launch | None = None,
) -> Summary:
    """Train one SAE, or resume it from its newest checkpoint, and publish it in `train.out`.

    Args:
        config: `root`, `storage`, `prices` and the section `train` are read.
        after_train: Measures what needs the subject model. Without it the summary names the missing
            figures in `left_out`, and a later call with it adds only those.
        extend: Allow `train.epochs` to exceed what the run in `out` was trained or planned for.
        launch: This process's place among those that train together; None if it is alone.

    Returns:
        The content of `summary.json`. A finished run is not trained again.

    Raises:
        ConfigError: A spec that does not fit the dataset, or another run in `out`; nothing is written.
        NonFiniteError: Loss or gradient is NaN or infinite; the last checkpoint is kept.
        IntegrityError: Stored bytes do not match their digests.
        KeyboardInterrupt: SIGINT, SIGTERM, SIGUSR1 or `winnow stop` was received; a checkpoint was made.
    """
    specs = [section(config.train, "train")]
    return train_fleet(config, specs, after_train=after_train, extend=extend, launch=launch)[0]


def train_fleet(
    config: Config,
    specs: Sequence[TrainSpec],
    *,
    after_train: AfterTrain | None = None,
    extend: bool = False,
    lost: Callable[[], bool] | None = None,
    launch: Launch | None = None,
) -> list[Summary]:
    """Train several SAEs from one dataset in this process; see `train`, whose errors it raises too.

    Finished ones are skipped. One whose loss is not finite stops alone; the others continue.

    Args:
        config: `root`, `storage` and `prices` are read.
        specs: One or more, each with its own `out`; device and threads are the same for all.
        after_train: See `train`.
        extend: See `train`.
        lost: Whether another service has taken the work over; called every few seconds. With it, as in a
            service, an earlier `winnow stop` ends the runs; without it, as in a command, it is removed.
        launch: See `train`.

    Returns:
        The summaries, in the order of `specs`.

    Raises:
        NonFiniteError: After the last step of the others, naming every SAE that failed.
        WorkerError: `lost` returned true; nothing has been written since.
    """
    first, alone, launch = specs[0], len(specs) == 1, launch or Launch()
    _require_one_process(specs)
    dataset = open_roots(
        config.root,
        first.roots,
        config.storage,
        follow=first.follow,
        timeout_seconds=first.follow_seconds,
    )
    for spec in specs:
        check_mesh(spec, launch.size)
    device = resolve_device(first.device, launch.local_rank if launch.size > 1 else None)
    identity = identity_of(dataset)
    # now, since the number of the subject's layers is part of what a run is compared by
    specs = [resolve_set(spec, dataset) for spec in specs]
    # one handle per reading, so that its rows are counted once
    readings = {rows: dataset.only(rows) for rows in dict.fromkeys(spec.rows for spec in specs)}
    found: dict[str, Summary] = {}
    with torch_settings(device, cpu_threads(first)), ExitStack() as cleanup:
        todo, members = [], []
        for spec in specs:  # all are checked before any is begun, and none may fail hours later
            if (reading := readings[spec.rows].reading) is not None:
                reading.require_held_out()
            order = plan_order(spec, readings[spec.rows])
            recipe = resolve_recipe(spec, dataset, order)
            out = open_store(spec.out, config.storage)
            summary = finished_summary(out, spec, identity, extend=extend)
            if summary is None:
                if reading is not None:
                    total = len(order.units) * order.rows_per_unit
                    say(f"rows with {spec.rows.words}: an epoch is {order.rows_per_epoch:,} of {total:,}")
                todo.append((recipe, order, out))
            else:
                found[spec.out] = summary
                say(f"{spec.out} is finished: nothing to train")
        if todo:
            # absolute: relative paths of a config are those of the working directory, which surprises
            folder = todo[0][2].uri + (f" and {len(todo) - 1} more" if len(todo) > 1 else "")
            say(f"reading {dataset.uri}; writing to {folder}")
        world = cleanup.enter_context(open_world(first, device, launch)) if todo else World()
        for recipe, order, out in todo:
            own = readings[recipe.spec.rows]
            members.append(Member(config, recipe, own, order, out, device, world=world, extend=extend))
        _train_all(members, found, cleanup, alone, lost)
    _require_all(members, alone)
    if after_train is not None and launch.rank == 0:
        for spec in specs:
            _add_figures(found[spec.out], config, spec, readings[spec.rows], device, after_train)
    return [found[spec.out] for spec in specs]


def _train_all(
    members: Sequence[Member],
    found: dict[str, Summary],
    cleanup: ExitStack,
    alone: bool,
    lost: Callable[[], bool] | None,
) -> None:
    """Begin all members and take all steps; the summary of each is added to `found` under its `out`."""
    try:
        for member in members:
            member.begin(cleanup, stopped_before=lost is not None)
        for summary, member in _run(members, alone, lost):
            found[member.spec.out] = summary
    except WorkerError:
        # another service may own these folders now: its status must not be overwritten
        raise
    except BaseException as error:
        for member in members:
            if member.spec.out not in found and member.failure is None:
                member.leave(error)
        raise


def _add_figures(
    summary: Summary,
    config: Config,
    spec: TrainSpec,
    dataset: ActivationStore,
    device: torch.device,
    after_train: AfterTrain,
) -> None:
    """Add the missing figures to a published summary, also in storage."""
    # a set's are measured by `winnow evaluate`, layer by layer and all at once
    if summary["left_out"] and spec.set is None:
        sae, out = (
            Sae.load(spec.out, device=device, storage=config.storage),
            open_store(spec.out, config.storage),
        )
        summary |= after_train(config, sae, dataset, spec.hook, out) | {"left_out": []}
        put_summary(out, summary)
        # only now: a kill before the summary must find it
        if out.size(LOSSES_KEY) is not None:
            out.delete(LOSSES_KEY)


def _require_one_process(specs: Sequence[TrainSpec]) -> None:
    # what belongs to the process or to the dataset's handle, of which there is one for all
    for field in ("roots", "device", "threads", "mesh", "follow", "follow_seconds"):
        values = {str(getattr(spec, field)) for spec in specs}
        if len(values) > 1:
            raise ConfigError(f"{field} of SAEs trained together", expected="one value", got=sorted(values))
    outs = [spec.out for spec in specs]
    if len(set(outs)) < len(outs):
        raise ConfigError("out of SAEs trained together", expected="a folder each", got=sorted(outs))


def _require_all(members: Sequence[Member], alone: bool) -> None:
    failed = [member for member in members if member.failure is not None]
    if not failed:
        return
    if alone and failed[0].failure is not None:
        # its own error says more than "1 of 1 failed"
        raise failed[0].failure
    raise NonFiniteError(
        f"{len(failed)} of {len(members)} SAEs failed, the others are published",
        got="; ".join(f"{member.spec.out}: {member.failure}" for member in failed),
    )


def _run(
    members: Sequence[Member], alone: bool, lost: Callable[[], bool] | None
) -> Iterator[tuple[Summary, Member]]:
    """Take all remaining steps, pass by pass; yields each SAE's summary as soon as it is published."""
    left = list(members)
    while left:
        together, until = _next_pass(left)
        if together[0].step < until:
            take_steps(together, until, alone, lost)
        for member in together:
            if member.failure is None and member.step == member.recipe.steps:
                yield member.publish(), member
        left = [m for m in left if m.failure is None and m.step < m.recipe.steps]


def _next_pass(members: Sequence[Member]) -> tuple[list[Member], int]:
    """Choose the members that take the next steps together, and the step up to which they do.

    Of one stream, the members furthest behind run until the first of them ends, or until they reach the
    step of another member of their stream, which then joins them.
    """
    # members part when a kill comes between their checkpoints; joining again is what keeps one read for all
    last = min(members, key=lambda member: member.step)
    stream = [member for member in members if member.stream_key == last.stream_key]
    together = [member for member in stream if member.step == last.step]
    ends = [member.recipe.steps for member in together]
    return together, min(ends + [member.step for member in stream if member.step > last.step])


def take_steps(
    members: list[Member],
    until: int,
    alone: bool = True,
    lost: Callable[[], bool] | None = None,
) -> None:
    """Take the steps up to `until`, with checkpoints in between and one at the end.

    Args:
        members: Members of one stream, all at the same step.
        until: Steps finished at the end.
        alone: Whether this process trains only one SAE, so that messages need not name it.
        lost: See `train_fleet`.
    """
    together, first, spec = _Together(members, alone, lost), members[0], members[0].spec
    steps = together.steps
    stream = together.open_rows(until)
    bar = Progress("train", steps * spec.batch_rows, "rows", done=first.step * spec.batch_rows)
    with closing(stream), stop_on_signals(together.stopping), bar, ExitStack() as stack:
        say(
            ("" if alone else f"{count_of(len(members), 'SAE')} from one stream: ")
            + f"{count_of(steps, 'step')} of {count_of(spec.batch_rows, 'row')} on {first.run.device}; "
            f"shuffled {count_of(first.order.group_units, 'unit')} at a time, "
            f"{human_bytes(stream.memory_bytes)} of memory"
        )
        if first.is_new:
            # said, since the first group of units must be read for it: half a minute without a step
            say(f"reading the first units and initialising from {count_of(spec.sample_rows, 'row')}")
            initialise_runs([m.run for m in members], stream)
        # only now: a stop during `initialise_runs` must not save weights that are not initialised
        for member in members:
            member.is_new = False
        batches = stack.enter_context(_transfer(members, stream, until))
        opened = mark = last_checkpoint = time.monotonic()
        step = first.step
        while step < until and together.running:
            asked = time.monotonic()
            batch = next(batches)
            waited = time.monotonic() - asked
            step += 1
            own, reports = together.take_one(batch, step)
            now = time.monotonic()
            # what no member took alone (waiting, telemetry, beginning a checkpoint) is split equally: the
            # members' seconds add up to the process's
            shared, mark = now - mark - sum(own.values()), now
            for member, seconds in own.items():
                counts = member.run.counts
                counts.seconds += seconds + shared / len(own)
                counts.seconds_waiting += waited / len(own)
            together.drop_failed()
            rate = stream.bytes_read / (now - opened)
            for member, (report, shares) in reports.items():
                member.log(_make_record(member, report) | shares | {"bytes_read_per_s": rate})
            if reports:
                _show(bar, step, steps, spec.batch_rows, {m: r for m, (r, _) in reports.items()})
            is_time = now - last_checkpoint >= spec.checkpoint_seconds
            if together.end_step(step, is_time, last=step == until):
                last_checkpoint = time.monotonic()


def _transfer(members: Sequence[Member], stream: SharedRows, until: int) -> Transfer:
    """The stream's batches up to `until`, moved to the members' device."""
    first = members[0]
    # a step in parts moves its rows itself: the whole batch on the device is what `accumulate` avoids
    whole = any(member.spec.accumulate == 1 for member in members)
    # a follower prefetches nothing: a step must not wait for rows that are not harvested yet
    ahead = False if first.spec.follow else None
    return Transfer(stream, until - first.step, first.run.device, whole=whole, ahead=ahead)


class _Together:
    """The members that take their steps together: which still run, and what ends their steps early.

    Arguments as for `take_steps`.
    """

    def __init__(self, members: Sequence[Member], alone: bool, lost: Callable[[], bool] | None) -> None:
        self.running = list(members)
        """Members that have not failed."""
        self.steps = max(m.recipe.steps for m in members)
        """Steps of the longest run."""
        self.stopping = threading.Event()
        """Set by a signal."""
        self._first, self._alone, self._lost = members[0], alone, lost

    def open_rows(self, until: int) -> SharedRows:
        """The stream's batches from the members' step up to `until`."""
        first, spec, world = self._first, self._first.spec, self._first.run.world
        dataset = first.dataset
        packed = travels_packed(first.run.device)
        return SharedRows(
            # a function, because only the first shard of a data rank opens it: one read for all shards
            lambda: dataset.stream(
                spec.stream_hooks,
                split="train",
                batch_rows=spec.batch_rows,
                seed=spec.stream_seed,
                lanes=spec.lanes,
                group_units=first.order.group_units,
                rank=world.data.rank,
                world=world.data.size,
                start_step=first.step,
                steps=until,
                dtype="packed" if packed else "float32",
            ),
            {hook: _like(dataset, hook, packed=packed) for hook in spec.stream_hooks},
            spec.batch_rows // world.data.size,
            first.step,
            first.run.device,
            world,
            # a harvest may keep a follower waiting for longer than a stop should
            self._stop_if_told if spec.follow else None,
        )

    def take_one(
        self, batch: Batch, step: int
    ) -> tuple[dict[Member, float], dict[Member, tuple[Report, dict[str, float]]]]:
        """Take one step of every running member; one whose loss is not finite fails alone.

        Args:
            batch: The rows.
            step: The number of the step, from 1.

        Returns:
            Seconds of each member, and for those that log this step its report and the shares of its parts.
        """
        own: dict[Member, float] = {}
        reports: dict[Member, tuple[Report, dict[str, float]]] = {}
        for member in self.running:
            started = time.monotonic()
            # the last step is always logged: the curves reach the end of the run
            logged = step == member.recipe.steps or step % member.spec.log_every_steps == 0
            report = None
            with sampling(self._first.run.device, logged) as spans:
                try:
                    report = member.take(batch)
                except NonFiniteError as error:
                    member.fail(error)
            if report is not None and spans is not None:
                reports[member] = report, spans.shares()
            own[member] = time.monotonic() - started
        return own, reports

    def drop_failed(self) -> None:
        """Continue without the members that have failed."""
        for member in [member for member in self.running if member.failure is not None]:
            self.running.remove(member)
            if not self._alone:
                log.warning("%s: %s The others continue.", member.spec.out, member.failure)

    def end_step(self, step: int, is_time: bool, *, last: bool) -> bool:
        """Stop, or begin checkpoints, if all ranks agree on it.

        Args:
            step: Steps finished.
            is_time: Whether the last checkpoint is old enough.
            last: Whether a checkpoint is made in any case.

        Returns:
            Whether checkpoints were begun.

        Raises:
            KeyboardInterrupt: A stop was asked for; checkpoints are durable.
            WorkerError: The work is lost.
        """
        first, world = self._first, self._first.run.world
        # a harvest pauses when too much waits for a checkpoint, so a follower saves after each group
        edge = bool(first.followers) and first.order.locate(step).step_in_group == 0
        must_stop, gone = self._must_stop()
        # the first rank's clock decides for all: a checkpoint that some ranks begin and others do not hangs
        stop, due = self._agree(must_stop, gone, world.leads and (edge or is_time))
        if stop and step < self.steps:
            self._stop_early()
        if not self.running or not (due or last):
            return False
        for member in self.running:
            member.checkpoint()
        return True

    def _stop_if_told(self) -> None:
        if self._agree(*self._must_stop())[0]:
            self._stop_early()

    def _must_stop(self) -> tuple[bool, bool]:
        """Whether this rank is told to stop, and whether its work is lost; renews the status on the way."""
        # at the status's pace, not at every step: each question is a request to storage
        due = [member for member in self.running if member.status.due]
        # before the status is written: after a loss the folder is another service's
        if due and self._lost is not None and self._lost():
            return False, True
        for member in due:
            member.status.write("training")
        told = self.stopping.is_set() or any(asked_to_stop(member.out) for member in due)
        return told and bool(self.running), False

    def _agree(self, must_stop: bool, gone: bool, is_due: bool = False) -> tuple[bool, bool]:
        """Whether all ranks stop, and whether a checkpoint is due."""
        stop, gone, due = self._first.run.world.any(must_stop, gone, is_due)
        if gone:
            raise WorkerError("another service has taken this work over")
        return stop, due

    def _stop_early(self) -> NoReturn:
        for member in self.running:
            if not member.is_new:
                member.checkpoint()
                # durable before it is said: who reads this line may switch the machine off
                member.saver.wait()
                name = "" if self._alone else f"{member.spec.out}: "
                say(f"{name}stopped after step {member.step} of {member.recipe.steps}; a checkpoint is kept")
        raise KeyboardInterrupt


def travels_packed(device: torch.device) -> bool:
    """Whether rows reach a device as they are stored, and are widened there."""
    # for a CPU the threads that gather rows widen them, while they are in cache
    return device.type == "cuda"


def _like(dataset: ActivationStore, hook: str, *, packed: bool) -> Tensor:
    """No rows [0, W] of a hook, in the type in which the stream gives them."""
    if not packed:
        return torch.empty(0, dataset.plan.d_model(hook))
    part, own = dataset.part_of(hook) if isinstance(dataset, JoinedStore) else (dataset, hook)
    return torch.empty(0, part.plan.stored_width(own), dtype=getattr(torch, part.plan.spec.dtype))


def _show(bar: Progress, step: int, steps: int, rows: int, reports: dict[Member, Report]) -> None:
    """Show the figures of a single SAE, or the range of a fleet's FVU."""
    records = [member.telemetry.records[-1] for member in reports]
    if len(records) == 1:
        shown = {key: f"{records[0][key]:.3f}" for key in ("loss", "fvu", "l0", "dead_share")}
    else:
        fvus = [record["fvu"] for record in records]
        shown = {"SAEs": len(records), "fvu": f"{min(fvus):.3f} to {max(fvus):.3f}"}
    bar.update(step * rows, step=f"{step}/{steps}", **shown)


def _make_record(member: Member, report: Report) -> Record:
    """Build one line of telemetry."""
    run, counts = member.run, member.run.counts
    return (
        {
            "step": counts.step,
            "time": round(time.time(), 3),
            "epoch": round(counts.step / run.recipe.steps_per_epoch, 4),
            "tokens": counts.tokens,
            "loss": report.loss,
            "fvu": report.fvu,
            "l0": report.l0,
            "dead_share": report.dead / run.latents,
            "auxk": report.auxk,
            "auxk_steps": counts.auxk_steps,
            "auxk_nonfinite_steps": counts.auxk_nonfinite,
            "grad_norm": report.grad_norm,
            "lr": report.lr,
            "tokens_per_s": counts.tokens / counts.seconds if counts.seconds else 0.0,
            "seconds": counts.seconds,
            "seconds_waiting_for_data": counts.seconds_waiting,
        }
        | ({} if not run.world.meshed else _of_the_mesh(run.world, report))
        | _of_layers(report)
    )


def _of_the_mesh(world: World, report: Report) -> Record:
    """Second rounds per row of this step, and bytes that this rank has sent so far."""
    return {
        "second_rounds": report.second_rounds / report.rows,
        "bytes_sent": world.data.bytes_sent + world.latent.bytes_sent,
    }


def _of_layers(report: Report) -> Record:
    """Of a set: each layer's FVU in this batch."""
    return {f"fvu.{n}": fvu for n, fvu in report.fvu_of.items()} if isinstance(report, SetReport) else {}
