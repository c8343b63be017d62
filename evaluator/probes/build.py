"""`python -m winnow.evaluator.probes.build FOLDER`: write our own probe suite as Parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from winnow.cli.console import emit, guard, print_table
from winnow.evaluator.probes.tasks import build_suite


def main(
    folder: Annotated[
        Path, typer.Argument(help="Created if absent. NAME.parquet and suite.json are written to it.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Build every task from texts that are installed here; the same versions give the same bytes.

    Example: `python -m winnow.evaluator.probes.build data/probes`, then `winnow evaluate SAE --tasks
    data/probes`
    """
    with guard():
        digests = build_suite(folder)
        emit(digests, as_json, lambda: print_table(str(folder), [[n, d[:16]] for n, d in digests.items()]))


if __name__ == "__main__":
    typer.run(main)
