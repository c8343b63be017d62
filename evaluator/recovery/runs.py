"""The runs of `winnow recovery`: every variant at every size and seed, stored after each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

from winnow.common.reporter import Progress
from winnow.evaluator.recovery import page
from winnow.evaluator.recovery.task import Task
from winnow.evaluator.recovery.train import FIRST_LR, Figures, measure_run, train_variant
from winnow.schemas.errors import IntegrityError
from winnow.store.objects import ObjectStore


class Cell(NamedTuple):
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

                fill_cell(store, records, Cell(variant, latents, k, rows), seeds, run)
                bar.advance(1)
    if records:
        _write_results(store, records)  # the remarks may be new
    return records


def fill_cell(
    store: ObjectStore,
    records: list[page.Record],
    cell: Cell,
    seeds: int,
    run: Callable[[int, float], Figures],
) -> None:
    """Search a cell's learning rate on seed 0, then run the other seeds; what is in `records` is not run.

    Args:
        store: Where results are written after each run.
        records: Grows.
        cell: What is trained.
        seeds: Number of seeds.
        run: Gives the figures of a seed and a learning rate.
    """

    def need(seed: int, lr: float) -> None:
        wanted = cell._asdict() | {"seed": seed, "lr": lr}
        if not any(wanted.items() <= record.items() for record in records):
            records.append(wanted | run(seed, lr))
            _write_results(store, records)

    def mine() -> list[page.Record]:
        return [record for record in records if cell._asdict().items() <= record.items()]

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


def _write_results(store: ObjectStore, records: Sequence[page.Record]) -> None:
    """Write results, page and picture."""
    store.put(page.JSON_KEY, page.dump(records))
    remarks = store.get(page.REMARKS_KEY).decode() if store.size(page.REMARKS_KEY) is not None else ""
    store.put(page.PAGE_KEY, page.page_of(records, remarks).encode())
    store.put(page.PLOT_KEY, page.draw_intervals(records))
    curves = page.draw_curves(records)
    if curves is not None:
        store.put(page.CURVE_KEY, curves)
