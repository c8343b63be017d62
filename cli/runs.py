"""`winnow runs`, `watch`, `stop` and `resume`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from winnow.cli.console import emit, guard, print_table, print_whole, stdout
from winnow.common.reporter import say
from winnow.schemas.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from winnow.jobs.runs import RunView
    from winnow.schemas.service import RunStatus
    from winnow.store.objects import ObjectStore

Root = Annotated[str, typer.Argument(metavar="ROOT", help="Folder or URI that holds runs.")]
RunUri = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder or URI (its train.out).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command("runs")(runs_command)
    app.command("watch")(watch_command)
    app.command("stop")(stop_command)
    app.command("resume")(resume_command)


def runs_command(root: Root, json: AsJson = False) -> None:
    """List the runs below a folder: state, progress, ETA, FVU, speed, cost; and a trainer service's jobs.

    States: training, stopping, stopped, finished, failed, lost (it was killed: the same command resumes from
    its last checkpoint). The cost is reckoned from `prices.trainer_hour`.

    Example: `winnow runs runs/`
    """
    with guard():
        from winnow.jobs.queue import job_facts, job_rows
        from winnow.jobs.runs import find_runs
        from winnow.store.objects import open_store

        store = open_store(root)
        found, jobs = find_runs(store), job_facts(store)
        # Jobs alone are no error: a queue is filled before its first run has a status.
        if not found and not jobs:
            raise ConfigError(f"{root} holds no runs", expected="folders with a status.json", got="none")
        facts: dict[str, Any] = {"runs": [seen.facts() for seen in found], "jobs": jobs}
        emit(facts, json, lambda: _show(root, found, jobs, job_rows(jobs)))


def _show(root: str, found: list[RunView], jobs: list[dict[str, Any]], rows: list[list[str]]) -> None:
    from winnow.jobs.runs import HEADER

    if found:
        print_table(root, [seen.row() for seen in found], HEADER)
        # Below the table: a cause is a sentence and would make its column too wide.
        for seen in found:
            if seen.status.cause:
                say(f"{seen.name or root}: {seen.status.cause}")
    if jobs:
        print_table("jobs", rows, ("job", "state", "attempts", "runs", "cause"))


def watch_command(
    run: RunUri,
    every: Annotated[float, typer.Option(help="Seconds between two updates.", min=0.2)] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show it once and exit.")] = False,
) -> None:
    """Show a run while it trains, wherever it does: progress, curves, where a step's time goes.

    Exits when the run ends. Ctrl-C ends the view only; the run continues.

    Example: `winnow watch runs/quickstart`
    """
    with guard():
        from rich.live import Live

        from winnow.store.objects import open_store

        store = open_store(run)
        seen, table = _look(run, store)
        # In a file or pipe a live view would be one whole table after another.
        if once or not stdout.is_terminal:
            print_whole(table)
            return
        with Live(table, console=stdout) as live:
            # Ends with a killed run too: without a sign of life its state becomes `lost`.
            while seen.state == "training":
                time.sleep(every)
                seen, table = _look(run, store)
                live.update(table)


def _look(run: str, store: ObjectStore) -> tuple[RunView, Table]:
    from rich.table import Table

    from winnow.jobs.runs import RunView, last_records, watch_rows

    status = _require_status(store, run)
    # Never `stopping`: a view ends with the state `training`, but a run that was asked to stop still trains.
    seen = RunView("", status, False, time.time())
    table = Table(show_header=False)
    for label, value in watch_rows(run, seen, last_records(store)):
        table.add_row(label, value)
    return seen, table


def stop_command(
    run: RunUri,
    queue: Annotated[
        str, typer.Option(metavar="ROOT", help="The queue in which the run's job still waits.")
    ] = "",
) -> None:
    """Ask a run to write a checkpoint and exit, wherever it trains; takes about 5 s and a step.

    A service does not restart it before `winnow resume`. With --queue a job is stopped that has not begun.

    Example: `winnow stop runs/quickstart`
    """
    with guard():
        from winnow.jobs.queue import require_job
        from winnow.store.objects import open_store
        from winnow.trainer.run.status import ask_to_stop, read_status

        store = open_store(run)
        if queue and read_status(store) is None:
            require_job(open_store(queue), run)
        # The mark would stay in the folder and stop a later `winnow train --extend`.
        elif _require_status(store, run).state == "finished":
            raise ConfigError(f"{run} is finished", fix="There is nothing to stop")
        ask_to_stop(store)
        say(f"{run} was asked to stop; `winnow runs` shows when it has")


def resume_command(run: RunUri) -> None:
    """Let a stopped run resume: a service restarts it; without one, run its own command again.

    Example: `winnow resume runs/quickstart`
    """
    with guard():
        from winnow.store.objects import open_store
        from winnow.trainer.run.status import withdraw_stop

        store = open_store(run)
        # An error, since this command starts nothing: silence would promise a run that nobody restarts.
        if not withdraw_stop(store):
            _require_status(store, run)
            raise ConfigError(
                f"{run} was not asked to stop", fix="Run its command again if it is not training"
            )
        say(f"{run} may resume: its service restarts it; without one, run its own command again")


def _require_status(store: ObjectStore, run: str) -> RunStatus:
    from winnow.trainer.run.status import read_status

    status = read_status(store)
    if status is None:
        raise ConfigError(
            f"{run} is no run",
            expected="a status.json that can be read",
            got="none",
            fix="Name its `train.out`; `winnow runs` lists the runs below a folder, and a job that waits in "
            "a queue is stopped with --queue",
        )
    return status
