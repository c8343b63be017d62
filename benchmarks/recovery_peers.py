"""The peers' trainers on the same rows as `winnow recovery`, added to the same results.

    python -m benchmarks.recovery_peers OUT [--peers sparsify sae-lens ...] [--latents 256 512] [--k 8]
        [--seeds 3] [--rows 1000000]

OUT is the folder of `winnow recovery`: its page and picture get a row per peer. Every peer has its own
normalisation, initialisation, optimiser and AuxK coefficient, warm-up over 5 % of the steps and decay over
the last 20 % if it has one, and, like ours, a search for its best learning rate on the first seed. Latents
are dead after as many rows as ours: their own defaults (ten million rows, or 512,000) would leave AuxK off on
this task. What a library saved is imported by `winnow.sae.formats` and measured as our own. It starts itself
in the peers' environment (`make peers`); finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from itertools import islice
from pathlib import Path

import torch

from benchmarks.peer_trainers import BATCH_PEERS, PEERS, Job
from benchmarks.peers import environment, installed
from winnow.common.reporter import reporting, say
from winnow.evaluator.recovery.page import page_of
from winnow.evaluator.recovery.runs import Cell, fill_cell, read_records
from winnow.evaluator.recovery.task import Task
from winnow.evaluator.recovery.train import DEAD_AFTER, Figures, figures_of
from winnow.sae.formats.convert import import_sae
from winnow.sae.model import Sae
from winnow.schemas.config import StorageSpec
from winnow.store.objects import ObjectStore, open_store

BATCH_ROWS = 512
SAMPLE_ROWS = 8192
"""Rows for the constants of a normalisation, as many as ours."""
WARMUP, DECAY = 0.05, 0.2
"""Shares of the run."""


def train_peer(name: str, task: Task, latents: int, k: int, lr: float) -> Figures:
    """Train one peer on each row once, and measure what it saved."""
    steps = task.rows // BATCH_ROWS
    sample = torch.cat(
        [torch.from_numpy(b) for b in islice(task.batches(BATCH_ROWS), SAMPLE_ROWS // BATCH_ROWS)]
    )
    job = Job(
        width=task.d_model,
        latents=latents,
        k=k,
        rows=BATCH_ROWS,
        sample=sample,
        steps=steps,
        lr=lr,
        seed=task.seed,
        warmup=round(WARMUP * steps),
        decay=round(DECAY * steps),
        dead_after=DEAD_AFTER,
    )
    peer = ({**PEERS, **BATCH_PEERS})[name](job)
    for rows in task.batches(BATCH_ROWS):
        peer.step(torch.from_numpy(rows))
    with tempfile.TemporaryDirectory() as folder:
        peer.save(Path(folder) / "theirs")
        import_sae(Path(folder) / "theirs", peer.format, str(Path(folder) / "sae"), hook="synthetic")
        return figures_of(Sae.load(Path(folder) / "sae"), task)


def recover(
    store: ObjectStore, peers: list[str], sizes: list[tuple[int, int]], seeds: int, rows: int
) -> None:
    """Make every run that the folder does not hold yet."""
    records = read_records(store)
    for name in peers:
        for latents, k in sizes:

            def run(seed: int, lr: float, name: str = name, n: int = latents, k: int = k) -> Figures:
                say(f"{name}: N = {n}, K = {k}, seed {seed}, lr {lr:g}")
                return train_peer(name, Task(rows=rows, seed=seed), n, k, lr)

            fill_cell(store, records, Cell(name, latents, k, rows), seeds, run)
    print(page_of(records))


def main() -> None:
    """Train what is missing, write, print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out")
    # The sparse mode computes the same as sae-lens, but more slowly.
    names = [name for name in (*PEERS, *BATCH_PEERS) if name != "sae-lens-sparse"]
    parser.add_argument("--peers", nargs="+", choices=[*PEERS, *BATCH_PEERS], default=names)
    parser.add_argument("--latents", nargs="+", type=int, default=[256, 512])
    parser.add_argument("--k", nargs="+", type=int, default=[8])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1_000_000)
    args = parser.parse_args()
    if importlib.util.find_spec("sparsify") is None:
        if not installed():
            sys.exit("error: the peers are not installed: make peers")
        os.execve(
            sys.executable, [sys.executable, "-m", "benchmarks.recovery_peers", *sys.argv[1:]], environment()
        )
    torch.set_num_threads(1)
    sizes = [(latents, k) for latents in args.latents for k in args.k]
    recover(open_store(args.out, StorageSpec()), args.peers, sizes, args.seeds, args.rows)


if __name__ == "__main__":
    with reporting():
        main()
