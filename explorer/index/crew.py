"""An index made by several workers through Ray: units and parts are handed out, one at a time to each.

Workers write blocks to the scratch folder and parts to the index, so nothing is merged here, and the bytes
are those of one worker with as many threads. Workers on other nodes must see the same scratch folder.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from winnow.cluster.crew import (
    Crew,
    CrewSettings,
    Named,
    cluster,
    gpus_per_actor,
    last_line,
    threads_per_actor,
)
from winnow.explorer.index.build import MakeAll, Recipe
from winnow.schemas.errors import WinnowError, WorkerError

log = logging.getLogger("winnow.explorer")

_ATTEMPTS = 3
"""Attempts per unit or part; those that end with the death of a node do not count."""
POLL_SECONDS = 1.0
NAMED = Named("index", "--workers", "--threads", "--gpus", "--ray-address")


class IndexWorker:
    """Makes blocks and parts of one index; the body of the Ray actor, usable without Ray.

    Args:
        recipe: The index.
        threads: CPU threads.
    """

    def __init__(self, recipe: Recipe, threads: int) -> None:
        self._recipe, self._threads = recipe, threads

    def ready(self) -> None:
        """Open dataset, SAE and index.

        Raises:
            ConfigError: The driver's scratch folder is not seen from here, or what `Recipe.open` raises.
        """
        torch.set_num_threads(self._threads)
        self._indexer = self._recipe.open()
        self._indexer.require_claim()

    def run(self, step: str, number: int) -> None:
        """Make a `block` or a `part`."""
        self._indexer.make(step, number)


@contextmanager
def crew_of(
    recipe: Recipe, workers: int, threads: int = 0, gpus: float | None = None, address: str | None = None
) -> Generator[MakeAll]:
    """Several workers in place of this process, for the duration of a `with`.

    Args:
        recipe: The index.
        workers: Largest number of workers.
        threads: CPU threads per worker; 0 divides a machine's cores among them.
        gpus: GPUs per worker, or a share of one; None is one if there are any.
        address: A running Ray cluster; None starts Ray on this machine.

    Raises:
        ConfigError: The cluster does not exist, or no worker fits on this machine.
    """
    settings = CrewSettings(
        NAMED,
        actors=workers,
        threads=threads,
        gpus=gpus,
        may_use_gpus=recipe.subject is None or recipe.subject.device != "cpu",
        address=address,
    )
    with cluster(settings):
        threads, share = threads_per_actor(settings), gpus_per_actor(settings)
        actor_class: Any = ray.remote(IndexWorker)
        remote = actor_class.options(num_cpus=threads, num_gpus=share)

        # Made with the first work and kept for both steps: a worker opens the SAE once, and a command that
        # finds nothing missing starts no worker.
        crew: Crew | None = None

        def make_all(step: str, todo: list[int], done: Callable[[], object]) -> None:
            nonlocal crew
            if todo:
                crew = crew or Crew(
                    lambda: remote.remote(recipe, threads),
                    workers,
                    {"CPU": float(threads), "GPU": share},
                    settings,
                )
                _distribute(crew, step, todo, done)

        yield make_all


def _distribute(crew: Crew, step: str, todo: list[int], done: Callable[[], object]) -> None:
    """Have every number of `todo` made."""
    # The first worker opens the inputs, so a wrong address or scratch folder is reported before any work.
    crew.await_first()
    queue, flying, tries = deque(todo), dict[Any, tuple[int, int]](), Counter[int]()
    while queue or flying:
        # One number per worker: whoever is quicker takes more, and a death costs one number.
        busy = {worker for worker, _ in flying.values()}
        for worker, actor in crew.members.items():
            if queue and worker not in busy:
                number = queue.popleft()
                flying[actor.run.remote(step, number)] = worker, number
        finished, _ = ray.wait([*flying, *crew.waiting], num_returns=1, timeout=POLL_SECONDS)
        for ref in finished:
            if ref not in flying:
                crew.welcome(ref)
                continue
            worker, number = flying.pop(ref)
            try:
                ray.get(ref)
            except RayActorError as error:
                # `lost` is true if the node died or was unreachable for a moment: no fault of this number.
                if not crew.lost(worker, error):
                    _failed(tries, step, number, WorkerError(f"{step} {number}", got=last_line(error)))
                queue.append(number)
            except RayTaskError as error:
                # Ray wraps what the worker raised; our own error carries the exit code and the fix.
                known = error.cause if isinstance(error.cause, WinnowError) else None
                _failed(tries, step, number, known or WorkerError(f"{step} {number}", got=last_line(error)))
                queue.append(number)
            else:
                done()


def _failed(tries: Counter[int], step: str, number: int, error: WinnowError) -> None:
    """Count a failure; raise `error` if it was the last attempt or no attempt can help."""
    tries[number] += 1
    # Exit code 2 is a wrong setting: it would fail again in the same way.
    if tries[number] >= _ATTEMPTS or error.exit_code == 2:
        raise error
    log.warning("index: %s %d failed (%dx), tried again: %s", step, number, tries[number], error)
