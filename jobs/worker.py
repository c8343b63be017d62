"""`python -m winnow.jobs.worker ROOT JOB ATTEMPT`: one attempt at a job, as a process of the trainer service.

It ends with 0 (published), STOPPED (a checkpoint is kept), PERMANENT (it would fail again) or another code.
It holds the service's pipe as its standard input: when the service dies, however it dies, the pipe ends and
the worker makes a checkpoint and goes.
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
    """Train a job's config, reporting on stderr; gives the exit code."""
    root, name, attempt = arguments[0], arguments[1], int(arguments[2])
    try:
        threading.Thread(target=_go_with_the_service, daemon=True).start()
        from winnow.cli.console import reporting_to_console
        from winnow.jobs.queue import Queue
        from winnow.trainer.mesh.world import launch_of, only_the_first_tells
        from winnow.trainer.plan.sweep import grid_specs
        from winnow.trainer.run.loop import train_fleet

        queue = Queue(open_store(root))
        job = next((job for job in queue.jobs() if job.name == name), None)
        if job is None:
            raise ConfigError(f"{root} has no job {name}")
        config = on_this_device(job.job.config)
        specs = grid_specs(config) if config.sweep is not None else [section(config.train, "train")]
        launch = launch_of(os.environ)
        with reporting_to_console(), only_the_first_tells(launch):
            train_fleet(config, specs, lost=lambda: queue.was_ended(name, attempt), launch=launch)
        return 0
    except KeyboardInterrupt:
        return STOPPED
    except (ConfigError, NonFiniteError, UnsupportedVersion, DependencyMissing) as error:
        print(f"error: {error}", file=sys.stderr)
        return PERMANENT
    except WinnowError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def on_this_device(config: Config) -> Config:
    """The config for a process that sees its own GPUs only: they are counted from 0."""
    train = section(config.train, "train")
    if train.device.startswith("cuda:"):
        train = train.model_copy(update={"device": "cuda"})
    return config.model_copy(update={"train": train})


def _go_with_the_service() -> None:
    while os.read(0, 1024):  # not through sys.stdin, whose lock a thread must not hold at the end
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # see winnow.cli.train
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # before and after the steps: end as by Ctrl-C
    sys.exit(main(sys.argv[1:]))
