"""`python -m winnow.jobs.worker ROOT JOB ATTEMPT`: one attempt at a job, as a process of the trainer service.

Exit codes: 0 (published), STOPPED (a checkpoint is kept), PERMANENT (it would fail again) or another. Its
standard input is a pipe from the service: when the service dies, even by SIGKILL, the pipe closes, and the
worker writes a checkpoint and exits.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from winnow.schemas.config import Config, section
from winnow.schemas.errors import (
    ConfigError,
    DependencyMissing,
    NonFiniteError,
    UnsupportedVersion,
    WinnowError,
)
from winnow.schemas.service import PERMANENT, STOPPED
from winnow.store.objects import open_store


def main(arguments: list[str]) -> int:
    """Train a job's config, reporting on stderr, and return the exit code."""
    root, name, attempt = arguments[0], arguments[1], int(arguments[2])
    try:
        # Before the imports, which take seconds: the service may die meanwhile.
        threading.Thread(target=_go_with_the_service, daemon=True).start()
        from winnow.cli.console import reporting_to_console
        from winnow.jobs.queue import Queue
        from winnow.trainer.mesh.world import launch_of, only_the_first_tells
        from winnow.trainer.plan.grid import grid_specs
        from winnow.trainer.run.loop import train_fleet

        queue = Queue(open_store(root))
        job = next((job for job in queue.jobs() if job.name == name), None)
        if job is None:
            raise ConfigError(f"{root} has no job {name}")
        config = _on_this_device(job.job.config)
        specs = grid_specs(config) if config.sweep is not None else [section(config.train, "train")]
        launch = launch_of(os.environ)
        with reporting_to_console(), only_the_first_tells(launch):
            # A job that another service has taken over is given up, or two processes would write one run.
            train_fleet(config, specs, lost=lambda: queue.was_ended(name, attempt), launch=launch)
        return 0
    except KeyboardInterrupt:
        return STOPPED
    # These would recur on every attempt: the job fails at once, not after max_attempts.
    except (ConfigError, NonFiniteError, UnsupportedVersion, DependencyMissing) as error:
        print(f"error: {error}", file=sys.stderr)
        return PERMANENT
    except WinnowError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _on_this_device(config: Config) -> Config:
    """The config for a process that sees only its own GPUs, which are numbered from 0."""
    train = section(config.train, "train")
    if train.device.startswith("cuda:"):
        train = train.model_copy(update={"device": "cuda"})
    return config.model_copy(update={"train": train})


def _go_with_the_service() -> None:
    # Not through sys.stdin, whose lock a thread must not hold when the interpreter ends.
    while os.read(0, 1024):
        pass
    # The signal that the service itself sends, so that there is one way of ending.
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # see winnow.cli.train
    # During the steps the trainer has a handler of its own; before and after them, end as by Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
