"""A run's `status.json`, and the mark that asks it to stop."""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING

from winnow.schemas.config import PricesSpec
from winnow.schemas.errors import IntegrityError, MissingObject, StoreError
from winnow.schemas.service import STATUS_KEY, RunState, RunStatus
from winnow.store.objects import ObjectStore
from winnow.trainer.run.metrics import RUNS

if TYPE_CHECKING:
    from winnow.trainer.step import Run, SetRun

STOP_KEY = "stop.json"
"""Its presence asks the run to make a checkpoint and end; `winnow resume` removes it."""
BEAT_SECONDS = 5.0
"""Seconds between two writes of the status, and the longest that a stop goes unnoticed."""


class StatusWriter:
    """Writes a run's status; the first write marks where this process began.

    Args:
        out: The run's folder.
        run: The run that it describes.
        prices: For `cost`; without a price per hour it is null.
    """

    def __init__(self, out: ObjectStore, run: Run | SetRun, prices: PricesSpec | None = None) -> None:
        self._out, self._run = out, run
        self._prices = prices if prices and prices.trainer_hour else None
        # of this process: the time left follows from its own speed, not from that before a resume elsewhere
        self._start, self._start_step = time.monotonic(), run.counts.step
        self._written = 0.0
        self.fvu: float | None = None

    @property
    def due(self) -> bool:
        """Whether `BEAT_SECONDS` have passed since the last write."""
        return time.monotonic() - self._written >= BEAT_SECONDS

    def write(self, state: RunState, cause: str = "") -> RunStatus:
        """Write the current status."""
        # before the put: a slow storage must not make the next one due at once
        self._written = time.monotonic()
        counts, recipe = self._run.counts, self._run.recipe
        taken, passed = counts.step - self._start_step, self._written - self._start
        left = passed / taken * (recipe.steps - counts.step) if taken else None
        seconds = counts.seconds
        status = RunStatus(
            state=state,
            step=counts.step,
            steps=recipe.steps,
            tokens=counts.tokens,
            latents=recipe.spec.latents,
            k=recipe.spec.k,
            hook=recipe.spec.place,
            fvu=self.fvu,
            tokens_per_s=counts.tokens / seconds if seconds else 0.0,
            seconds=seconds,
            waiting_share=counts.seconds_waiting / seconds if seconds else 0.0,
            eta_seconds=left if state == "training" else None,
            cost=self._prices.trainer_hour * seconds / 3600 if self._prices else None,
            currency=self._prices.currency if self._prices else "",
            device=str(self._run.device),
            host=socket.gethostname(),
            pid=os.getpid(),
            # wall clock, because another machine compares it with its own
            beat=time.time(),
            cause=cause,
        )
        self._out.put(STATUS_KEY, status.to_json())
        RUNS.status(self._out.uri, status)
        return status


def read_status(out: ObjectStore) -> RunStatus | None:
    """Read a run's status; None if there is none or it cannot be read."""
    try:
        return RunStatus.from_json(out.get(STATUS_KEY), origin=f"{out.uri}/{STATUS_KEY}")
    except (MissingObject, IntegrityError):
        return None


def ask_to_stop(out: ObjectStore) -> None:
    """Ask the run that trains into `out`, now or later, to make a checkpoint and end."""
    out.put(STOP_KEY, b'{"kind": "winnow.stop"}\n')


def withdraw_stop(out: ObjectStore) -> bool:
    """Remove the mark of `ask_to_stop`; returns whether there was one."""
    there = out.size(STOP_KEY) is not None
    if there:
        out.delete(STOP_KEY)
    return there


def asked_to_stop(out: ObjectStore) -> bool:
    """Whether the run is asked to stop; False if storage does not answer."""
    try:
        return out.size(STOP_KEY) is not None
    except StoreError:
        # a hiccup of storage ends no run; the question comes again after BEAT_SECONDS
        return False
