"""What every command shares: the config file, errors as exit codes, progress, tables.

Results go to stdout, everything else to stderr, so that `--json` leaves one object for a program.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

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

from winnow.schemas.errors import WinnowError

stderr = Console(stderr=True, highlight=False, markup=False, emoji=False)
stdout = Console(highlight=False, markup=False, emoji=False)

PLAIN_SECONDS = 10.0
"""Between progress lines where stderr is no terminal."""

T = TypeVar("T")


@contextmanager
def guard() -> Generator[None]:
    """A `WinnowError` becomes a sentence on stderr and its exit code; no memory 1, Ctrl-C 130."""
    try:
        yield
    except WinnowError as error:
        stderr.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(error.exit_code) from error
    except MemoryError as error:
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
        stderr.print("interrupted: run the same command again to go on", style="yellow")
        raise typer.Exit(130) from error


def say(message: str) -> None:
    """One line for people, on stderr."""
    stderr.print(message, markup=False, soft_wrap=True)


def emit(value: Mapping[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    """The command's result: one JSON object on stdout, or `show()` for people."""
    if as_json:
        sys.stdout.write(json.dumps(value, indent=1, sort_keys=True, default=str) + "\n")
        sys.stdout.flush()
    else:
        show()


def print_table(title: str, rows: Sequence[Sequence[object]], header: Sequence[str] = ()) -> None:
    """A small table on stdout."""
    stdout.print(title, style="bold", markup=False, soft_wrap=True)
    table = Table(show_header=bool(header))
    for index in range(len(rows[0]) if rows else len(header)):
        table.add_column(header[index] if header else "", justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*[str(cell) for cell in row])
    stdout.print(table)


class Progress:
    """Progress with rate and ETA: a live bar on a terminal, plain lines elsewhere.

    Args:
        label: What is going on.
        total: Work in `unit`s; None where it is not known.
        unit: The rate's unit, such as `tokens`.
        done: Work finished by an earlier run: shown, but not counted into the rate.
    """

    def __init__(self, label: str, total: float | None, unit: str, done: float = 0) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self._start_done, self._start, self._last = done, time.monotonic(), 0.0
        self._facts, self._shown = "", -1.0
        self._bar: RichProgress | None = None

    @property
    def rate(self) -> float:
        """Units a second in this run."""
        return (self.done - self._start_done) / max(time.monotonic() - self._start, 1e-9)

    @property
    def eta_seconds(self) -> float | None:
        """Seconds left at this run's rate, where it can be told."""
        if self.total is None or self.rate <= 0:
            return None
        return max(self.total - self.done, 0) / self.rate

    def __enter__(self) -> Progress:
        self._start = time.monotonic()
        if stderr.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[facts]}", style="dim"),
                console=stderr,
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self.label, total=self.total, completed=int(self.done), rate="", facts=""
            )
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif error[0] is None and self.done != self._shown:
            self._line()

    def advance(self, amount: float, **facts: object) -> None:
        """Report `amount` more units done; `facts` are shown beside (`fvu="0.21"`)."""
        self.update(self.done + amount, **facts)

    def update(self, done: float, **facts: object) -> None:
        """Report `done` units in all."""
        self.done = done
        if facts:
            self._facts = " ".join(f"{key} {value}" for key, value in facts.items())
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=int(done),
                rate=f"{human_rate(self.rate)} {self.unit}/s",
                facts=self._facts,
            )
        elif time.monotonic() - self._last >= PLAIN_SECONDS:
            self._line()

    def _line(self) -> None:
        self._last, self._shown = time.monotonic(), self.done
        share = f"/{self.total:,.0f} ({self.done / self.total:.0%})" if self.total else ""
        eta = self.eta_seconds
        left = f", ETA {int(eta // 60)}:{int(eta % 60):02d}" if eta is not None else ""
        facts = f"  {self._facts}" if self._facts else ""
        say(f"{self.label}: {self.done:,.0f}{share} {self.unit}, {human_rate(self.rate)}/s{left}{facts}")


def human_rate(rate: float) -> str:
    """`1,204`, or `0.35` where the figure is small."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def human_bytes(count: float) -> str:
    """`1.5 GiB`."""
    for suffix in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or suffix == "TiB":
            return f"{count:.0f} {suffix}" if suffix == "B" else f"{count:.1f} {suffix}"
        count /= 1024
    raise AssertionError("unreachable")
