"""`winnow serve-trainer`, and the work of `winnow submit --to ROOT`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from winnow.cli.console import emit, guard
from winnow.common.reporter import say


def register(app: typer.Typer) -> None:
    """Add `serve-trainer` to `app`."""
    app.command("serve-trainer")(serve_command)


def serve_command(
    root: Annotated[str, typer.Argument(metavar="ROOT", help="Folder or URI that holds the queue.")],
    workers: Annotated[int, typer.Option(help="Jobs at a time on a CPU; with GPUs, one per GPU.", min=1)] = 1,
    gpus: Annotated[
        str, typer.Option(help="GPUs to use, such as `0,2`; `all`, or `none` for the CPU.")
    ] = "all",
    port: Annotated[int, typer.Option(help="Port of /healthz and /metrics on 127.0.0.1; 0: a free one.")] = 0,
    poll: Annotated[float, typer.Option(help="Seconds between two reads of the queue.", min=0.05)] = 2.0,
    until_empty: Annotated[
        bool, typer.Option("--until-empty", help="Exit once no job is left that can be trained here.")
    ] = False,
) -> None:
    """Train what `winnow submit CONFIG --to ROOT` puts into the queue, each job in its own processes.

    A job takes one device; one whose `train.mesh` is larger takes a group of them. A job that fails resumes
    from its last checkpoint, up to its number of attempts. The service may be killed at any time: started
    again, it resumes each run from its last checkpoint, and nothing is trained twice. SIGTERM drains: every
    run writes a checkpoint, then the service exits with 0. Any number of services may share a root.

    Example: `winnow serve-trainer s3://bucket/trainer --port 9400`
    """
    with guard():
        import torch

        from winnow.jobs.prometheus import serving
        from winnow.jobs.service import LEASE_SECONDS, Service, slots
        from winnow.schemas.config import StorageSpec
        from winnow.store.objects import open_store

        # Waits well below half a lease: a service that cannot reach its queue must end its runs before
        # another takes them over.
        store = open_store(root, StorageSpec(timeout_seconds=LEASE_SECONDS / 12))
        # Before the first claim: on a store without if-none-match two services would train the same job.
        store.probe()
        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
        devices = slots(gpus, seen, workers)
        service = Service(store, devices, dict(os.environ), poll)
        # The line comes after the bind: with --port 0 nobody knows the port before.
        with serving(service, port) as bound:
            say(f"serving {store.uri} on {', '.join(devices)}; health and metrics: http://127.0.0.1:{bound}")
            service.run(until_empty=until_empty)
        say("every run is finished or has written a checkpoint")


def submit_config(config: Path, root: str, sets: list[str], attempts: int, as_json: bool) -> None:
    """Put a config into the queue below `root` and print the job's name."""
    from winnow.common.config_file import load_config
    from winnow.jobs.queue import Queue, job_facts
    from winnow.schemas.service import JOBS
    from winnow.store.objects import open_store

    # A job's name comes from its config, so that submitting it again changes nothing.
    store = open_store(root)
    name, new = Queue(store).submit(load_config(config, sets), attempts)
    told = f"job {name} is in the queue of {root}"
    if not new:
        fact = next(fact for fact in job_facts(store) if fact["job"] == name)
        told = f"job {name} exists already, of the same config, and is {fact['state']}"
        if fact["state"] == "failed":
            told = (
                f"job {name} of the same config has failed ({fact['cause']}). To try it again, delete "
                f"{root.rstrip('/')}/{JOBS}/{name} and submit it"
            )
    emit({"job": name, "new": new}, as_json, lambda: say(told))
