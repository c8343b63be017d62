"""Quality at equal tokens: Winnow and each peer, trained on the same stored rows, judged by one definition.

    python -m benchmarks.quality --config configs/quickstart.yaml --work runs/quality --json OUT --page PAGE

N = 4096, K = 32, batches of 2048 rows in the same order. Every trainer has its own normalisation,
initialisation, optimiser and AuxK coefficient, warm-up over 5 % of the steps, decay over the last 20 % if it
has one. AuxK treats a latent as dead after a tenth of the run (the peers' defaults of millions of rows would
never be reached), in Winnow after its default; `--dead-after` sets one share for all. Each trainer has three
learning rates a factor of 2 apart, tried with the first seed; if the best of them is the highest or the
lowest, the next one on that side is tried too, until the best lies between two others. The best is then
trained with the other seeds. What a library saved is imported by `winnow.sae.formats` and measured as
Winnow's own SAE: raw space, rows of weight 1 (peers never see the others).

Finished cells (trainer, learning rate, seed) are kept in `--work`, so an interrupted command can be repeated.
It starts itself in the peers' environment (`make peers`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.peer_trainers import PEERS, Job
from benchmarks.peers import environment, installed
from benchmarks.quality_page import draw, page_of
from benchmarks.report import write_report
from winnow.common.config_file import load_config
from winnow.common.reporter import reporting, say
from winnow.evaluator.families.downstream import AtHook, Variant, splice_losses
from winnow.evaluator.setting import subject_spec_of
from winnow.sae.formats.convert import import_sae
from winnow.sae.model import CARD_KEY, Sae
from winnow.schemas.config import Config
from winnow.schemas.fit import check_subject
from winnow.schemas.training import TrainSpec
from winnow.store import ActivationStore
from winnow.subject.load import Subject
from winnow.subject.tail import Tail
from winnow.trainer.mesh.shard import Shard
from winnow.trainer.run.heldout import heldout_figures
from winnow.trainer.run.loop import train
from winnow.trainer.run.start import plan_order

OURS = "winnow"
RATIO = 2.0
"""Factor between neighbouring learning rates."""
MOST_RATES = 9
"""Rates tried per trainer; after so many a best rate at the edge is accepted, and the page shows it."""
MIDDLE: dict[str, float] = {
    OURS: 8e-3,
    "sparsify": 8e-3,
    "sparsify-adam": 4e-3,
    "sae-lens": 4e-3,
    "dictionary-learning": 8e-3,
}
"""Middle of each trainer's first three learning rates; the search moves them."""
SEEDS = (0, 1, 2)
WARMUP, DECAY, DEAD = 0.05, 0.2, 0.1
"""Shares of the run."""
SAMPLE_BATCHES = 4
"""Batches from which constants of a normalisation are computed; they are also trained on."""
SILENCE_UNITS = 8
"""Training units on which latents are checked for activity."""
FIGURES = ("fvu_raw", "delta_ce", "dead_share")


class Cell(NamedTuple):
    """One training run."""

    trainer: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.trainer}-{self.lr:g}-{self.seed}"


@dataclass
class Bench:
    """Settings that all cells share."""

    config: Config
    dataset: ActivationStore
    work: Path
    latents: int
    k: int
    batch_rows: int
    epochs: float
    threads: int = 0
    """CPU threads of Winnow's runs; 0 takes every core."""
    dead_after: float | None = None
    """Share of the run after which a latent is dead; None takes Winnow's default, and DEAD for the peers."""

    @property
    def hook(self) -> str:
        """The hook of the rows."""
        return self.dataset.plan.spec.hooks[0]

    def spec(self, cell: Cell) -> TrainSpec:
        """Settings of the cell for Winnow; peers get the same batches."""
        return TrainSpec(
            out=str(self.work / cell.name / "run"),
            hook=self.hook,
            latents=self.latents,
            k=self.k,
            batch_rows=self.batch_rows,
            epochs=self.epochs,
            lr=cell.lr,
            warmup_fraction=WARMUP,
            decay_fraction=DECAY,
            seed=cell.seed,
            threads=self.threads,
        )

    def steps(self, spec: TrainSpec) -> int:
        """Steps of a whole run."""
        # The addition makes 1.5 epochs of a step count that rounding puts just below a whole number whole.
        return int(spec.epochs * plan_order(spec, self.dataset).steps_per_epoch + 1e-9)

    def dead_rows(self, spec: TrainSpec, share: float) -> int:
        """A share of a run, in rows."""
        return max(1, round(share * self.steps(spec) * spec.batch_rows))

    def result(self, cell: Cell) -> dict[str, Any]:
        """Recorded figures of a cell; empty if there are none."""
        path = self.work / cell.name / "cell.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        return found if found.get("of") == self.identity else {}

    def keep(self, cell: Cell, **figures: Any) -> None:
        """Add to the recorded figures of a cell."""
        path = self.work / cell.name / "cell.json"
        known = self.result(cell) | figures | {"of": self.identity}
        # Written beside and renamed: a kill must not leave half a record, which would read as an error.
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(known, indent=1, sort_keys=True))
        fresh.replace(path)

    @property
    def identity(self) -> list[Any]:
        """Settings by which a recorded cell belongs to this experiment."""
        # `dead_after` only if it is given, so that records from before the option keep their identity.
        window = [] if self.dead_after is None else [self.dead_after]
        return [self.dataset.plan.fingerprint, self.latents, self.k, self.batch_rows, self.epochs, *window]

    def sae(self, cell: Cell) -> Sae:
        """A finished cell's SAE."""
        return Sae.load(self.work / cell.name / ("run" if cell.trainer == OURS else "sae"))


def run_cell(bench: Bench, cell: Cell) -> None:
    """Train one cell and measure it on the held-out rows, unless it is recorded."""
    if bench.result(cell):
        return
    say(f"training {cell.name}")
    folder = bench.work / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    if cell.trainer == OURS:
        spec = bench.spec(cell)
        if bench.dead_after is not None:
            spec = spec.model_copy(update={"dead_after_tokens": bench.dead_rows(spec, bench.dead_after)})
        train(bench.config.model_copy(update={"train": spec}))
    else:
        train_peer(bench, cell)
    seconds = time.monotonic() - start
    bench.keep(
        cell, seconds=seconds, **heldout_figures([Shard.alone(bench.sae(cell))], bench.dataset, bench.hook)[0]
    )


def train_peer(bench: Bench, cell: Cell) -> None:
    """Train with a library on the same batches as Winnow's run of this seed."""
    spec, dataset, folder = bench.spec(cell), bench.dataset, bench.work / cell.name
    order = plan_order(spec, dataset)
    steps = bench.steps(spec)
    stream = dataset.stream(
        [bench.hook],
        batch_rows=spec.batch_rows,
        seed=spec.seed,
        lanes=spec.lanes,
        group_units=order.group_units,
        steps=steps,
    )
    with closing(stream):
        batches: Iterator[Tensor] = (b.rows[bench.hook][b.weights > 0].clone() for b in stream)
        first = list(islice(batches, SAMPLE_BATCHES))
        job = Job(
            width=first[0].shape[1],
            latents=spec.latents,
            k=spec.k,
            rows=spec.batch_rows,
            sample=torch.cat(first),
            steps=steps,
            lr=cell.lr,
            seed=cell.seed,
            warmup=round(WARMUP * steps),
            decay=round(DECAY * steps),
            dead_after=bench.dead_rows(spec, DEAD if bench.dead_after is None else bench.dead_after),
        )
        peer = PEERS[cell.trainer](job)
        for rows in chain(first, batches):
            peer.step(rows)
    peer.save(folder / "theirs")
    if not (folder / "sae" / CARD_KEY).exists():
        import_sae(folder / "theirs", peer.format, str(folder / "sae"), hook=bench.hook)


@torch.no_grad()
def silent_share(bench: Bench, sae: Sae) -> float:
    """Share of latents that no row of weight 1 of the first `SILENCE_UNITS` training units activates."""
    units, size = bench.dataset.plan.split_units("train"), bench.dataset.plan.rows_per_unit
    awake = torch.zeros(sae.latents, dtype=torch.bool)
    for unit in list(units)[:SILENCE_UNITS]:
        first, stop = unit * size, (unit + 1) * size
        here = torch.from_numpy(bench.dataset.weights([bench.hook], first, stop)) > 0
        rows = torch.from_numpy(bench.dataset.read_rows(bench.hook, first, stop))[here]
        for some in rows.split(2048):
            values, indices = sae.encode(some)
            awake[indices[values > 0]] = True
    return 1 - awake.float().mean().item()


def measure_in_subject(bench: Bench, cells: list[Cell], windows: int) -> None:
    """Measure delta CE of all cells that lack it on so many held-out windows, in one pass."""
    # In one pass, because all cells share the subject's run up to the hook.
    plan = bench.dataset.plan
    windows = min(windows, len(plan.split_units("validation")) * plan.spec.windows_per_unit)
    missing = [cell for cell in cells if bench.result(cell).get("windows") != windows]
    if not missing:
        return
    subject = Subject.load(subject_spec_of(plan, bench.config.subject))
    check_subject(subject.identity, plan.subject)

    def variant(sae: Sae) -> Variant:
        return lambda x, _: sae(x)

    losses = splice_losses(
        AtHook(Tail(subject, bench.hook)),
        bench.dataset,
        range(windows),
        {cell.name: variant(bench.sae(cell)) for cell in missing},
    )
    for cell in missing:
        delta_ce = float((losses[cell.name] - losses["clean"]).mean())
        bench.keep(cell, delta_ce=delta_ce, windows=windows)


def run(bench: Bench, trainers: list[str], seeds: tuple[int, ...], windows: int) -> dict[str, Any]:
    """Run every cell of the trainers and return the rows of the table."""
    finals: list[Cell] = []
    searched: dict[str, dict[float, float]] = {}
    for trainer in trainers:

        def fvu_at(lr: float, trainer: str = trainer) -> float:
            cell = Cell(trainer, lr, seeds[0])
            run_cell(bench, cell)
            return bench.result(cell)["fvu_raw"]

        searched[trainer] = search(MIDDLE[trainer], fvu_at)
        best = min(searched[trainer], key=searched[trainer].__getitem__)
        chosen = [Cell(trainer, best, seed) for seed in seeds]
        for cell in chosen:
            run_cell(bench, cell)
            if "dead_share" not in bench.result(cell):
                bench.keep(cell, dead_share=silent_share(bench, bench.sae(cell)))
        finals += chosen
    measure_in_subject(bench, finals, windows)
    return {trainer: _row(bench, trainer, finals, searched[trainer]) for trainer in trainers}


def search(middle: float, fvu_at: Callable[[float], float]) -> dict[float, float]:
    """Search the best learning rate: `middle` and its neighbours, then outwards until the best is inside.

    Args:
        middle: The first guess.
        fvu_at: Trains, or looks up, the FVU of a rate.

    Returns:
        FVU by ascending rate; infinite for a rate whose FVU is not a number.
    """
    tried = {round_rate(middle * RATIO**step): float("nan") for step in (-1, 0, 1)}
    fresh = list(tried)
    while True:
        for lr in fresh:
            fvu = fvu_at(lr)
            tried[lr] = fvu if math.isfinite(fvu) else float("inf")
        lowest, *_, highest = sorted(tried)
        best = min(tried, key=tried.__getitem__)
        if best not in (lowest, highest) or len(tried) == MOST_RATES:
            return dict(sorted(tried.items()))
        fresh = [round_rate(best / RATIO if best == lowest else best * RATIO)]
        tried[fresh[0]] = float("nan")


def round_rate(lr: float) -> float:
    """A rate rounded to three digits."""
    # One name per rate, whether the search came to it by multiplying or by dividing.
    return float(f"{lr:.3g}")


def _row(bench: Bench, trainer: str, finals: list[Cell], searched: dict[float, float]) -> dict[str, Any]:
    cells = [cell for cell in finals if cell.trainer == trainer]
    results = [bench.result(cell) for cell in cells]
    tried = {f"{lr:g}": fvu for lr, fvu in searched.items()}
    figures = {name: [result[name] for result in results] for name in (*FIGURES, "l0")}
    known = {"lr": cells[0].lr, "fvu_by_lr": tried, "seeds": [cell.seed for cell in cells]}
    return known | {"windows": results[0]["windows"]} | figures


def page(rows: dict[str, Any], bench: Bench, command: str, remarks: str = "", plot: str = "") -> str:
    """The page of results as Markdown."""
    plan = bench.dataset.plan
    steps = bench.steps(bench.spec(Cell(OURS, 1e-3, 0)))
    intro = (
        f"N = {bench.latents:,}, K = {bench.k}, {steps} steps of {bench.batch_rows:,} rows of `{bench.hook}`"
        f" of {plan.subject.model.rpartition('/')[2]}, the same rows in the same order for every"
        " trainer. Held-out rows, raw space, rows of weight 1. Mean and range over the seeds."
    )
    windows = " or ".join(str(count) for count in sorted({row["windows"] for row in rows.values()}))
    notes = NOTES.format(units=SILENCE_UNITS, windows=windows)
    return page_of(rows, intro, notes, remarks, command, plot)


NOTES = """Each trainer has its own normalisation, initialisation, optimiser and AuxK coefficient; warm-up
over 5 % of the steps; decay over the last 20 % (sparsify's Adam: linear after the warm-up; its default
optimiser, signum: neither, it averages). AuxK treats a latent as dead after a fortieth of the run in Winnow
(its default), and after a tenth in the peers, whose own defaults are longer than this run. Winnow publishes
the better of its weights and their moving average, by held-out FVU in its normalised space. `dead`: latents
that no row of {units} training units activates. Delta CE is measured on {windows} held-out windows."""


def main() -> None:
    """Train what is missing, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--root", help="the dataset, if it is not the config's")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/quality"), help="where finished cells are kept"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--page", type=Path, help="the table as Markdown; PAGE's .remarks.md is appended to it"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 takes every core")
    parser.add_argument("--cells", nargs="+", choices=list(MIDDLE), default=list(MIDDLE))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--epochs", type=float, default=1.5)
    parser.add_argument("--latents", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-rows", type=int, default=2048)
    parser.add_argument(
        "--dead-after", type=float, help="share of the run after which a latent is dead, for every trainer"
    )
    parser.add_argument("--windows", type=int, default=64, help="held-out windows for delta CE")
    args = parser.parse_args()
    if importlib.util.find_spec("sparsify") is None:
        if not installed():
            sys.exit("error: the peers are not installed: make peers")
        command = [sys.executable, "-m", "benchmarks.quality", *sys.argv[1:]]
        os.execve(sys.executable, command, environment())
    config = load_config(args.config, [f"root={args.root}"] if args.root else [])
    dataset = ActivationStore.open(config.root, config.storage)
    sizes = (args.latents, args.k, args.batch_rows, args.epochs)
    if args.threads:
        torch.set_num_threads(args.threads)
    bench = Bench(config, dataset, args.work, *sizes, args.threads, args.dead_after)
    rows = run(bench, args.cells, tuple(args.seeds), args.windows)
    figures = {"trainers": rows, "of": bench.identity}
    print(json.dumps(write_report("quality", figures, args.json), indent=1))
    if args.page:
        args.page.parent.mkdir(parents=True, exist_ok=True)
        remarks, plot = args.page.with_suffix(".remarks.md"), args.page.with_suffix(".png")
        said = remarks.read_text() if remarks.exists() else ""
        args.page.write_text(page(rows, bench, "python -m benchmarks.quality", said, plot.name))
        plot.write_bytes(draw(rows))


if __name__ == "__main__":
    with reporting():
        main()
