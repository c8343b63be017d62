"""One SAE of a training process: its folder, its state, its end.

A process trains one SAE or several (a fleet). What they share is the stream; everything else is here.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress

import torch

from winnow.common.device import cpu_threads
from winnow.schemas.config import Config
from winnow.schemas.errors import NonFiniteError, StoreError
from winnow.schemas.training import SaeIdentity, TrainSpec
from winnow.store import ActivationStore
from winnow.store.format.order import LaneOrder
from winnow.store.objects import ObjectStore
from winnow.store.read.follow import Follower
from winnow.trainer.mesh.shard import Witness
from winnow.trainer.mesh.world import World
from winnow.trainer.run.checkpoint_files import Saver
from winnow.trainer.run.loggers import Loggers
from winnow.trainer.run.publish import Summary, publish
from winnow.trainer.run.start import identity_of, stand, stream_state
from winnow.trainer.run.status import StatusWriter, allow_again, asked_to_stop
from winnow.trainer.run.telemetry import Record
from winnow.trainer.run.warm_start import load_source
from winnow.trainer.step.step import Recipe


class Member:
    """One SAE that is being trained.

    Args:
        config: `storage` and `prices` are read.
        recipe: How it is trained.
        dataset: From what.
        order: Which row comes when.
        out: Its folder.
        device: Where its weights live.
        world: The mesh of processes.
        extend: Take over a checkpoint of fewer epochs.
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
        self.recipe, self.order, self._dataset = recipe, order, dataset
        self._files = out
        self.out = out if world.leads else Witness(out)  # one rank tells of the run
        self._identity: SaeIdentity = identity_of(dataset)
        self.run, self.telemetry, self.is_new = stand(
            recipe, dataset, order, self._identity, self.out, device, world=world, extend=extend
        )
        if self.is_new and self.spec.init_from is not None:
            self.run.source = load_source(self.spec.init_from, self.run.sae, config.storage)
        self._kept = None if self.is_new else self.step
        self.saver = Saver(out, self.run, self._identity, cpu_threads(self.spec))
        self.status = StatusWriter(self.out, self.run, config.prices)
        self.follower: Follower | None = None
        self._loggers: Loggers | None = None
        self.failure: NonFiniteError | None = None

    def begin(self, cleanup: ExitStack, stopped_before: bool = False) -> None:
        """The first writing, once nothing can be wrong with any SAE of the process.

        Args:
            cleanup: Ends what is begun.
            stopped_before: Heed an old `winnow stop`, instead of taking it away.

        Raises:
            KeyboardInterrupt: Such a one is there.
        """
        world = self.run.world
        (stopped,) = world.any(stopped_before and asked_to_stop(self.out))
        if stopped:
            raise KeyboardInterrupt
        with world.together():
            self._files.probe(single_writer=True)  # can we write there? asked before hours of work
            if world.leads:
                allow_again(self.out)
                self._loggers = Loggers(self.spec, self.out, self.step)
                cleanup.callback(self._loggers.close)
            self.status.write("training")
        if self._dataset.arrivals is not None and world.leads:
            self.follower = cleanup.enter_context(self._following())

    def _following(self) -> Follower:
        """What tells a harvest how far this run is."""
        return Follower(
            self._dataset.store,
            self._dataset.plan,
            self.order,
            out=self.spec.out,
            epochs=self.recipe.steps / self.order.steps_per_epoch,
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
    def shares(self) -> tuple[tuple[str, ...], LaneOrder]:
        """Equal for those that one stream can feed."""
        return self.spec.read_hooks, self.order

    def fail(self, error: NonFiniteError) -> None:
        """Take note that the run cannot go on: which units its rows come from, and what is saved."""
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
        if self._loggers is not None:
            self._loggers.log(record)

    def checkpoint(self) -> None:
        """Begin to make the run as it stands durable, unless it is; `saver.wait` waits for it."""
        if self._kept == self.step:
            return
        self._kept = self.step
        self.telemetry.flush()  # first: lines past a checkpoint are cut on resume, missing ones never come
        state = stream_state(self._dataset, self.order, self.spec.read_hooks, self.step)
        follower, step = self.follower, self.step
        self.saver.save(state, then=lambda: follower.at(step) if follower is not None else None)

    def publish(self) -> Summary:
        """Evaluate, write the SAE, and be done."""
        self.saver.wait()
        # the dataset may have been sealed meanwhile
        summary = publish(self.run, self.telemetry, self._dataset, identity_of(self._dataset), self.out)
        if self.follower is not None:
            self.follower.at(self.step, finished=True)
        self.status.fvu = summary["fvu"]
        self.status.write("finished")
        return summary

    def leave(self, cause: BaseException) -> None:
        """Say how the run ended before its last step, if storage still takes it."""
        self.saver.settle()
        with suppress(StoreError):
            if isinstance(cause, KeyboardInterrupt):
                self.status.write("stopped")
            else:
                self.status.write("failed", str(cause))
