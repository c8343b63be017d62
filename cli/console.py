"""What every command shares: messages and progress on stderr, errors as exit codes, results and tables.

Results go to stdout, everything else to stderr, so that `--json` leaves one object for a program.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table

from winnow.common.figures import human_rate
from winnow.common.memory import out_of_memory
from winnow.common.reporter import Display, Lines, Progress, reporting, say
from winnow.schemas.errors import WinnowError

# No markup, highlighting or emoji codes: files and roots may be named like `[red]` or `:bug:`, and are shown
# as they are. Lines are printed with `soft_wrap`: in a pipe or file rich would break them at 80 columns, also
# inside a path.
stderr = Console(stderr=True, highlight=False, markup=False, emoji=False)
stdout = Console(highlight=False, markup=False, emoji=False)


class Bar:
    """A live bar on a terminal's stderr, below the lines that are printed meanwhile."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            # Last: facts vary in length, and what stands behind them would jump.
            TextColumn("{task.fields[facts]}", style="dim"),
            console=stderr,
        )
        self._bar.start()
        self._task = self._bar.add_task(
            progress.label, total=progress.total, completed=int(progress.done), rate="", facts=""
        )

    def update(self) -> None:
        """See `common.reporter.Display`."""
        progress = self._progress
        self._bar.update(
            self._task,
            completed=int(progress.done),
            rate=f"{human_rate(progress.rate)} {progress.unit}/s",
            facts=progress.facts,
        )

    def close(self, finished: bool) -> None:
        """Leave the bar as it is, whether or not the work is finished."""
        # A bar that ends short of its total already shows that.
        del finished
        self._bar.stop()


class ConsoleReporter(Lines):
    """The reporter of all commands: a live bar on a terminal, plain lines elsewhere."""

    def say(self, message: str) -> None:
        """Print the line on stderr, above a live bar."""
        stderr.print(message, markup=False, soft_wrap=True)

    def begin(self, progress: Progress) -> Display:
        """See `common.reporter.Reporter`."""
        # Off a terminal rich shows a bar only once, at its end; a job's log gets a line every 10 s instead.
        return Bar(progress) if stderr.is_terminal else super().begin(progress)


class _Records(logging.Handler):
    """Prints a log record as a line, such as `warning: ...`, above a live bar."""

    def emit(self, record: logging.LogRecord) -> None:
        # Through rich, not a StreamHandler, whose lines would be written across the live bar.
        try:
            message = f"{record.levelname.lower()}: {self.format(record)}"
            stderr.print(message, markup=False, soft_wrap=True)
        except Exception:  # as every handler of the standard library
            self.handleError(record)


# INFO holds details for a program's own log; what people should see comes through `say`.
_RECORDS = _Records(logging.WARNING)
_LOGGER = logging.getLogger("winnow")


@contextmanager
def reporting_to_console() -> Generator[None]:
    """Show messages, progress and warnings of library code on stderr until the block ends."""
    # Blocks nest: one handler for all, or each warning would be shown once per block.
    outermost = _RECORDS not in _LOGGER.handlers
    _LOGGER.addHandler(_RECORDS)
    try:
        with reporting(ConsoleReporter()):
            yield
    finally:
        if outermost:
            _LOGGER.removeHandler(_RECORDS)


LOOPBACK = "127.0.0.1"
MetricsPort = Annotated[
    int | None,
    typer.Option(
        "--metrics-port",
        metavar="PORT",
        help="Serve Prometheus metrics (/metrics) and /healthz on this port meanwhile; 0: a free one.",
    ),
]
MetricsHost = Annotated[
    str,
    typer.Option(
        "--metrics-host",
        metavar="ADDRESS",
        help="Address that --metrics-port listens on; 0.0.0.0: anyone who reaches the machine may read.",
    ),
]


@contextmanager
def serving_metrics_if(port: int | None, host: str) -> Generator[None]:
    """Serve the process's metrics while the block runs, if a port is given."""
    if port is None:
        yield
        return
    from winnow.common.metrics import serving_metrics

    with serving_metrics(port, host) as bound:
        say(f"metrics: http://{host}:{bound}/metrics")
        yield


class _TorchAnnouncer(MetaPathFinder):
    """Says that PyTorch is being loaded when it is first looked for, and leaves the finding to others."""

    def find_spec(self, fullname: str, *_: object) -> None:
        """See `importlib.abc.MetaPathFinder`."""
        if fullname == "torch":
            sys.meta_path.remove(self)
            say("loading PyTorch")


@contextmanager
def _announcing_torch() -> Generator[None]:
    """Say once, in the block, that PyTorch is being loaded: ten seconds on a cold disk."""
    announcer = _TorchAnnouncer()
    # Of a launch each rank would say it before it knows its rank.
    if "torch" not in sys.modules and "RANK" not in os.environ:
        sys.meta_path.insert(0, announcer)
    try:
        yield
    finally:
        if announcer in sys.meta_path:
            sys.meta_path.remove(announcer)


@contextmanager
def guard() -> Generator[None]:
    """Report a command's work on stderr, and turn its errors into exit codes.

    A `WinnowError` becomes a sentence on stderr and its own exit code; lack of memory gives 1, Ctrl-C 130.
    """
    try:
        with reporting_to_console(), _announcing_torch():
            yield
    except WinnowError as error:
        stderr.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(error.exit_code) from error
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or out_of_memory(error)):
            raise
        # A sentence in place of a traceback: the question is what was lost, and nothing was.
        detail = f" ({' '.join(str(error).split())})" if str(error) else ""
        stderr.print(
            f"error: this process ran out of memory{detail}. What it had stored is kept: give it more "
            "memory, or free some, and run the same command again.",
            style="red",
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        stderr.print("interrupted: run the same command again to resume", style="yellow")
        # 128 + SIGINT, as a shell says it.
        raise typer.Exit(130) from error


def emit(value: Mapping[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    """Write the command's result to stdout: one JSON object, or whatever `show()` prints for people."""
    if as_json:
        # Past rich, which would wrap it. Keys are sorted, so that two results can be compared by diff.
        sys.stdout.write(json.dumps(value, indent=1, sort_keys=True, default=str) + "\n")
        sys.stdout.flush()
    else:
        show()


def print_table(title: str, rows: Sequence[Sequence[object]], header: Sequence[str] = ()) -> None:
    """Print a small table on stdout."""
    stdout.print(title, style="bold", markup=False, soft_wrap=True)
    # The title is a line above, since rich would wrap a table's own title at the table's width.
    table = Table(show_header=bool(header))
    for index in range(len(rows[0]) if rows else len(header)):
        table.add_column(header[index] if header else "", justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*[str(cell) for cell in row])
    print_whole(table)


def print_whole(table: Table) -> None:
    """Print a table on stdout; in a pipe or a file as wide as its cells, none of them cut or wrapped."""
    if stdout.is_terminal:
        stdout.print(table)
        return
    # Of a pipe rich takes 80 columns, or COLUMNS, for the width and would cut the names that a program reads.
    wide = Console(file=stdout.file, width=10_000, highlight=False, markup=False, emoji=False)
    wide.print(table, crop=False)
