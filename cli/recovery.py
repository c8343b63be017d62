"""`winnow recovery`: train every variant on rows with known directions, and count what it finds."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import typer

from winnow.cli.console import emit, guard, print_table
from winnow.common.reporter import Progress, say
from winnow.evaluator.recovery import page
from winnow.evaluator.recovery.task import Task
from winnow.evaluator.recovery.train import FIRST_LR, VARIANTS, Figures, measure_run, train_variant
from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import ConfigError, IntegrityError
from winnow.store.objects import ObjectStore, open_store

HELP = """Train SAEs on synthetic rows whose true directions are known, and see how many they find.

No dataset is needed: the rows are drawn from a seed as they are trained on (D = 64, 256 directions,
Poisson(8) of them a row with Zipf weights, 1,000,000 rows, each seen once). Every variant searches for its
best learning rate on the first seed, until it lies between two others, and takes it for the other seeds.

Writes `recovery.json`, `recovery.md` and `recovery.png` into OUT, and `recovery_curve.png` where a variant
has three sizes N or more; the page ends with what you write into `recovery.remarks.md` there. Runs that OUT
already holds are not done again, so it can be stopped, and widened by more variants, sizes or seeds.
"""
EPILOG = "Example: `winnow recovery runs/recovery --variants topk,batchtopk --latents 256 --seeds 1`"


def register(app: typer.Typer) -> None:
    """Add the command `recovery` to an app."""

    @app.command("recovery", help=HELP, epilog=EPILOG)
    def command(
        out: Annotated[str, typer.Argument(help="Folder or URI for the results.")],
        variants: Annotated[str, typer.Option(help="Names, separated by commas.")] = ",".join(VARIANTS),
        latents: Annotated[str, typer.Option(help="Dictionary sizes N.")] = "256,512",
        k: Annotated[str, typer.Option(help="Active latents K.")] = "8",
        seeds: Annotated[int, typer.Option(min=1, help="Seeds: 0, 1, ...")] = 3,
        rows: Annotated[int, typer.Option(min=16_384, help="Rows trained on.")] = 1_000_000,
        as_json: Annotated[
            bool, typer.Option("--json", help="Print the results as one JSON object.")
        ] = False,
    ) -> None:
        with guard():
            chosen = _names(variants)
            sizes = [(n, size) for n in _numbers("latents", latents) for size in _numbers("k", k)]
            store = open_store(out, StorageSpec())
            records = recover(store, chosen, sizes, seeds, rows)
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


class Place(NamedTuple):
    """What is trained: the fields of a record that say so."""

    variant: str
    latents: int
    k: int
    rows: int


def recover(
    store: ObjectStore,
    variants: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    seeds: int,
    rows: int,
) -> list[page.Record]:
    """Every run that `store` does not hold yet; results are written after each.

    Args:
        store: The folder of the results.
        variants: Names in `VARIANTS`.
        sizes: Pairs (N, K).
        seeds: Number of seeds.
        rows: Rows trained on.

    Returns:
        All runs that the folder now holds.
    """
    records = read_records(store)
    with Progress("recovery", len(variants) * len(sizes), "cells") as bar:
        for variant in variants:
            for latents, k in sizes:

                def run(
                    seed: int, lr: float, variant: str = variant, n: int = latents, k: int = k
                ) -> Figures:
                    task = Task(rows=rows, seed=seed)
                    return measure_run(train_variant(variant, task, n, k, lr=lr), task)

                fill_cell(store, records, Place(variant, latents, k, rows), seeds, run)
                bar.advance(1)
    if records:
        write(store, records)  # the remarks may be new
    return records


def fill_cell(
    store: ObjectStore,
    records: list[page.Record],
    place: Place,
    seeds: int,
    run: Callable[[int, float], Figures],
) -> None:
    """Search a cell's learning rate on seed 0, then run the other seeds; what is in `records` is not run.

    Args:
        store: Where results are written after each run.
        records: Grows.
        place: What is trained.
        seeds: Number of seeds.
        run: Gives the figures of a seed and a learning rate.
    """

    def need(seed: int, lr: float) -> None:
        wanted = place._asdict() | {"seed": seed, "lr": lr}
        if not any(wanted.items() <= record.items() for record in records):
            records.append(wanted | run(seed, lr))
            write(store, records)

    def mine() -> list[page.Record]:
        return [record for record in records if place._asdict().items() <= record.items()]

    while (lr := page.next_lr(mine(), FIRST_LR)) is not None:
        need(0, lr)
    for seed in range(1, seeds):
        need(seed, page.best_lr(mine()))


def read_records(store: ObjectStore) -> list[page.Record]:
    """The runs that a folder holds.

    Raises:
        IntegrityError: Its `recovery.json` is something else.
    """
    if store.size(page.JSON_KEY) is None:
        return []
    try:
        return list(json.loads(store.get(page.JSON_KEY))["runs"])
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{store.uri}/{page.JSON_KEY} holds no results", fix="Delete it") from error


def write(store: ObjectStore, records: Sequence[page.Record]) -> None:
    """Write results, page and picture."""
    store.put(page.JSON_KEY, page.dump(records))
    remarks = store.get(page.REMARKS_KEY).decode() if store.size(page.REMARKS_KEY) is not None else ""
    store.put(page.PAGE_KEY, page.page_of(records, remarks).encode())
    store.put(page.PLOT_KEY, page.draw_intervals(records))
    curves = page.draw_curves(records)
    if curves is not None:
        store.put(page.CURVE_KEY, curves)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in VARIANTS:
            raise ConfigError("--variants", expected=f"some of {', '.join(VARIANTS)}", got=repr(name))
    return names


def _numbers(what: str, text: str) -> list[int]:
    found: list[Any] = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in found):
        raise ConfigError(f"--{what}", expected="whole numbers above 0, separated by commas", got=repr(text))
    return [int(part) for part in found]
