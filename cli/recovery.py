"""`winnow recovery`: train every variant on rows with known directions, and count those it recovers."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from winnow.cli.console import emit, guard, print_table
from winnow.common.reporter import say
from winnow.schemas.errors import ConfigError

HELP = """Train SAEs on synthetic rows whose true directions are known, and count how many they recover.

No dataset is needed: the rows are drawn from a seed as they are trained on (D = 64, 256 directions,
Poisson(8) of them per row with Zipf weights, 1,000,000 rows, each seen once). Every variant searches for its
best learning rate on the first seed, until it lies between two others, and uses it for the other seeds.

Writes `recovery.json`, `recovery.md` and `recovery.png` to OUT, and `recovery_curve.png` if a variant has at
least three sizes N; the page ends with the text of `recovery.remarks.md` there. Runs that OUT already holds
are not repeated: the command can be interrupted, and extended by variants, sizes or seeds.
"""
ALL = "topk,multi-topk,batchtopk,jumprelu,relu,matryoshka,topk-anneal,topk-beta2,topk-pruned"
"""The keys of `winnow.evaluator.recovery.train.VARIANTS`, whose module imports torch."""
EPILOG = "Example: `winnow recovery runs/recovery --variants topk,batchtopk --latents 256 --seeds 1`"


def register(app: typer.Typer) -> None:
    """Add the command `recovery` to an app."""

    @app.command("recovery", help=HELP, epilog=EPILOG)
    def command(
        out: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URI for the results.")],
        variants: Annotated[str, typer.Option(help="Names, separated by commas.")] = ALL,
        latents: Annotated[str, typer.Option(help="Dictionary sizes N, separated by commas.")] = "256,512",
        k: Annotated[str, typer.Option(help="Active latents K per row; several, separated by commas.")] = "8",
        seeds: Annotated[int, typer.Option(min=1, help="Number of seeds: 0, 1, ...")] = 3,
        rows: Annotated[int, typer.Option(min=16_384, help="Rows trained on.")] = 1_000_000,
        as_json: Annotated[
            bool, typer.Option("--json", help="Print the results as one JSON object.")
        ] = False,
    ) -> None:
        with guard():
            from winnow.evaluator.recovery import page
            from winnow.evaluator.recovery.runs import recover
            from winnow.store.objects import open_store

            # All options are checked before the first run, not when their turn comes after many.
            chosen = _names(variants)
            sizes = [(n, size) for n in _numbers("latents", latents) for size in _numbers("k", k)]
            store = open_store(out)
            records = recover(store, chosen, sizes, seeds, rows)
            # Read back from the page, so that terminal and page round alike.
            table = [
                line.strip("| ").split(" | ") for line in page.page_of(records).splitlines() if "±" in line
            ]
            emit(
                {"runs": records},
                as_json,
                lambda: (
                    print_table(f"recovery → {out}", [[" ".join(row[:3]), row[5]] for row in table])
                    if table
                    else say(page.page_of(records))
                ),
            )


def _names(text: str) -> list[str]:
    from winnow.evaluator.recovery.train import VARIANTS

    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in VARIANTS:
            raise ConfigError("--variants", expected=f"some of {', '.join(VARIANTS)}", got=repr(name))
    return names


def _numbers(what: str, text: str) -> list[int]:
    found: list[Any] = [part.strip() for part in text.split(",")]
    # `isdecimal` first: `int` also takes "1_0", "+8" and blanks.
    if not all(part.isdecimal() and int(part) > 0 for part in found):
        raise ConfigError(f"--{what}", expected="whole numbers above 0, separated by commas", got=repr(text))
    return [int(part) for part in found]
