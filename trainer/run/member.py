"""One SAE or transcoder set of a training process: its folder, its state, its end.

A process trains one or several (a fleet). They share the stream; everything else is here.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress

import torch

from winnow.common.device import cpu_threads
from winnow.common.figures import human_bytes
from winnow.common.reporter import say
from winnow.schemas.config import Config
from winnow.schemas.errors import NonFiniteError, StoreError
from winnow.schemas.training import SaeIdentity, TrainSpec
from winnow.store import ActivationStore
from winnow.store.format.order import LaneOrder
from winnow.store.objects import ObjectStore
from winnow.store.read.follow import Follower
from winnow.store.read.torch_stream import Batch
from winnow.trainer.mesh.witness import Witness
from winnow.trainer.mesh.world import World
from winnow.trainer.run.checkpoint import least_bytes
from winnow.trainer.run.checkpoint_files import Saver
from winnow.trainer.run.loggers import Loggers
from winnow.trainer.run.metrics import RUNS
from winnow.trainer.run.publish import Summary, publish
from winnow.trainer.run.publish_set import publish_set
from winnow.trainer.run.start import identity_of, restore_or_create, rows_of, stream_state
from winnow.trainer.run.status import StatusWriter, asked_to_stop, withdraw_stop
from winnow.trainer.run.telemetry import Record
from winnow.trainer.run.warm_start import load_source
from winnow.trainer.step import Recipe, Run, SetReport, SetRun, StepReport, train_set, train_step


class Member:
    """One SAE, or one set of a transcoder per layer, that is being trained.

    Args:
        config: `storage` and `prices` are read.
        recipe: How it is trained.
        dataset: What it is trained on.
        order: The order of the rows.
        out: Its folder.
        device: The device of its weights.
        world: The mesh of processes.
        extend: Resume also from a checkpoint of fewer epochs.
    """

    def __init__(
        self,
        config: Config,
        recipe: Recipe,
        dataset: ActivationStore,
        order: LaneOrder,
        out: ObjectStore,
        device: torch.device,
        *,
        world: World,
        extend: bool,
    ) -> None:
        self.recipe, self.order, self.dataset = recipe, order, dataset
        # every rank writes its rows of a checkpoint; telemetry, status and the SAE are written by one of them
        self._files = out
        self.out = out if world.leads else Witness(out)
        self._identity: SaeIdentity = identity_of(dataset)
        self.run, self.telemetry, self.is_new = restore_or_create(
            recipe, dataset, order, self._identity, self.out, device, world=world, extend=extend
        )
        # now, not at the first step: a source that does not fit is an error before anything is written
        if self.is_new and self.spec.init_from is not None and isinstance(self.run, Run):
            self.run.source = load_source(
                self.spec.init_from, self.run.sae, config.storage, self.spec.latents
            )
        self._kept = None if self.is_new else self.step
        self.saver = Saver(out, self.run, self._identity, cpu_threads(self.spec))
        self.status = StatusWriter(self.out, self.run, config.prices)
        self.followers: list[Follower] = []
        self._loggers: Loggers | None = None
        self.failure: NonFiniteError | None = None

    def begin(self, cleanup: ExitStack, stopped_before: bool = False) -> None:
        """Write for the first time, after every SAE of the process has been checked.

        Args:
            cleanup: Closes what is opened here.
            stopped_before: Heed an earlier `winnow stop` instead of removing it.

        Raises:
            KeyboardInterrupt: There is one, and it is heeded.
            StoreError: The folder cannot be written to, or its disk has no room for a checkpoint.
        """
        world = self.run.world
        # decided by all ranks together: one that raised alone would leave the others in a collective
        (stopped,) = world.any(stopped_before and asked_to_stop(self.out))
        if stopped:
            raise KeyboardInterrupt
        with world.together():
            # storage that is full or cannot be written to is found before hours of work, not at the first
            # checkpoint
            self._require_space()
            self._files.probe(single_writer=True)
            if world.leads:
                withdraw_stop(self.out)
                self._loggers = Loggers(self.spec, self.out, self.step)
                cleanup.callback(self._loggers.close)
            self.status.write("training")
        followed = [part for part in self.dataset.datasets if part.arrivals is not None]
        for part in followed if world.leads else ():
            self.followers.append(cleanup.enter_context(self._following(part)))

    def _require_space(self) -> None:
        # what is certainly too little: how many checkpoints there will be at once, only the run's time tells
        need, free = least_bytes(self.run), self._files.free_bytes()
        if free is not None and need > free:
            raise StoreError(
                f"disk of {self._files.uri} is too small for one checkpoint",
                expected=f"{human_bytes(need)} free, and the same again for each of "
                f"{self.spec.checkpoints_kept} that are kept",
                got=human_bytes(free),
                fix="Free space, or choose another train.out",
            )

    def _following(self, dataset: ActivationStore) -> Follower:
        """Open what tells a harvest how far this run is."""
        return Follower(
            dataset.store,
            dataset.plan,
            self.order,
            out=self.spec.out,
            epochs=self.recipe.steps / self.order.steps_per_epoch,
            # drawn before the first checkpoint: a harvest that paused earlier would wait for this run, which
            # waits for the harvest
            sample_steps=-(-self.spec.sample_rows // self.spec.batch_rows),
            step=self.step,
        )

    @property
    def spec(self) -> TrainSpec:
        """Its spec."""
        return self.recipe.spec

    @property
    def step(self) -> int:
        """Steps finished."""
        return self.run.counts.step

    @property
    def stream_key(self) -> tuple[tuple[str, ...], LaneOrder]:
        """Hooks and order, equal for members that one stream can feed."""
        return self.spec.stream_hooks, self.order

    def take(self, batch: Batch) -> StepReport | SetReport | None:
        """Train on one batch; see `train_step`, whose errors it raises."""
        if isinstance(self.run, SetRun):
            return train_set(self.run, batch.rows, batch.weights)
        rows, target = rows_of(batch.rows, self.spec)
        return train_step(self.run, rows, batch.weights, target)

    def fail(self, error: NonFiniteError) -> None:
        """Record that the run cannot continue: which units its rows come from, and what is saved."""
        place = self.order.locate(self.step)
        units = list(self.order.units_of(place.epoch, place.group))
        saved = (
            "No checkpoint was made."
            if self._kept is None
            else f"The checkpoint of step {self._kept} is kept."
        )
        fix = f"Its rows come from units {units}. {saved} {error.fix or ''}"
        self.failure = NonFiniteError(error.what, expected=error.expected, got=error.got, fix=fix)
        self.telemetry.flush()
        self.status.write("failed", str(self.failure))

    def log(self, record: Record) -> None:
        """Add a telemetry line."""
        self.status.fvu = record["fvu"]
        self.telemetry.log(record)
        RUNS.record(self.out.uri, record)
        if self._loggers is not None:
            self._loggers.log(record)

    def checkpoint(self) -> None:
        """Begin a checkpoint of the current step, unless there is one; `saver.wait` waits for it."""
        # the step is noted before it is durable: a save that fails raises in the next `save` or `wait`
        if self._kept == self.step:
            return
        self._kept = self.step
        # telemetry first: lines past a checkpoint are cut on resume, but missing ones never come back
        self.telemetry.flush()
        state = stream_state(self.dataset, self.order, self.spec.stream_hooks, self.step)
        # after the index, not now: the ring deletes what the follower has passed, and a resume would need it
        step = self.step
        self.saver.save(state, then=lambda: self._passed(step))

    def _passed(self, step: int, *, finished: bool = False) -> None:
        for follower in self.followers:
            follower.at(step, finished=finished)

    def publish(self) -> Summary:
        """Evaluate and write the SAE, and mark the run as finished."""
        self.saver.wait()
        say(f"{self.out.uri}: measuring on the held-out rows")
        # identity is asked for again: a harvest that was followed may have been sealed meanwhile
        facts = self.telemetry, self.dataset, identity_of(self.dataset), self.out
        run = self.run
        summary = publish_set(run, *facts) if isinstance(run, SetRun) else publish(run, *facts)
        self._passed(self.step, finished=True)
        self.status.fvu = summary["fvu"]
        self.status.write("finished")
        return summary

    def leave(self, cause: BaseException) -> None:
        """Write how the run ended before its last step, if storage still accepts writes."""
        self.saver.settle()
        # storage may be what failed: the cause that is on its way must not be replaced by this one
        with suppress(StoreError):
            if isinstance(cause, KeyboardInterrupt):
                self.status.write("stopped")
            else:
                self.status.write("failed", str(cause))
