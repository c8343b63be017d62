"""Train an SAE on rows with known directions, through the trainer's own step, and see what it found.

Legend: B rows of a batch, D width, N latents, K active latents a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import torch

from winnow.common.device import torch_settings
from winnow.evaluator.recovery.task import BLOCK_ROWS, Task, recovery
from winnow.sae.init import initialise
from winnow.sae.metrics import L0, Fvu
from winnow.sae.model import Sae
from winnow.schemas.base import validate
from winnow.schemas.training import TrainSpec
from winnow.trainer.run.threshold import calibrate
from winnow.trainer.run.warm_start import warm_start
from winnow.trainer.step.step import Recipe, Run, train_step

DEAD_AFTER = 2000
"""Rows of silence after which a latent is dead: the rarest direction comes about 10 times in as many."""
TEST_BLOCKS = 2
"""Blocks of fresh rows that FVU and L0 are measured on; as many training blocks give a threshold."""
Figures = dict[str, float]
VARIANTS: dict[str, dict[str, Any]] = {
    "topk": {},
    "multi-topk": {"multi_topk": True},
    "batchtopk": {"activation": "batchtopk"},
    "jumprelu": {"activation": "jumprelu"},
    "relu": {"activation": "relu", "sparsity_coefficient": 0.1},
    "matryoshka": {"activation": "batchtopk"},
    "topk-anneal": {},
    "topk-beta2": {"adam_betas": (0.9, 0.99)},
    "topk-pruned": {},
}
"""Fields of each variant's spec; see `fields_of` for those that depend on its sizes. The task has no
hierarchy for Matryoshka's prefixes to find: what they cost is shown. `topk-pruned` is trained in two runs:
see `train_variant`."""
FIRST_LR = 0.01
"""Where everybody's search for a learning rate begins; see `synthetic_page.next_lr`."""


def fields_of(variant: str, latents: int, k: int) -> dict[str, Any]:
    """Fields of a variant's spec at one size: `VARIANTS`, Matryoshka's prefixes, and K's fall from 4K."""
    if variant == "matryoshka":
        return VARIANTS[variant] | {"matryoshka": (latents // 4, latents // 2)}
    if variant == "topk-anneal":
        return VARIANTS[variant] | {"k_start": min(4 * k, latents)}
    return VARIANTS[variant]


def spec_of(task: Task, latents: int, k: int, **fields: Any) -> TrainSpec:
    """A spec for a task: dataset normalisation, small batches, one pass; `fields` win.

    Raises:
        ConfigError: Fields that a spec does not have, or that do not go together.
    """
    base = {
        "out": "synthetic",
        "hook": "synthetic",
        "latents": latents,
        "k": k,
        "normalize": "dataset",
        "encoder_norm": "match",  # as in all committed results; 0.5 gave the same
        "batch_rows": 512,
        "lr": FIRST_LR,
        "dead_after_tokens": DEAD_AFTER,
        "seed": task.seed,
        "device": "cpu",
        "threads": 1,
    }
    return validate(TrainSpec, base | fields, origin="the variant")


def train_variant(variant: str, task: Task, latents: int, k: int, **fields: Any) -> Run:
    """Train a variant on `task.rows` rows, each once.

    `topk-pruned` spends the first half of them on twice the latents and the second on the better half of
    these (`train.init_from`): 1.5 times the products of the others.
    """
    spec = spec_of(task, latents, k, **fields, **fields_of(variant, latents, k))
    if variant != "topk-pruned":
        return train_on(task, spec)
    wide = train_on(replace(task, rows=task.rows // 2), spec.model_copy(update={"latents": 2 * latents}))
    return train_on(task, spec, begin_at=wide.counts.step, source=wide.sae)


def train_on(
    task: Task,
    spec: TrainSpec,
    advance: Callable[[int], None] | None = None,
    *,
    begin_at: int = 0,
    source: Sae | None = None,
) -> Run:
    """Train on `task.rows` rows, each once, drawn as they are needed.

    Args:
        task: The task.
        spec: `batch_rows`, `epochs` and everything that a step reads; the run takes epochs * rows/B steps.
        advance: Told of the rows of every step.
        begin_at: Batches of the task that are left to others; the run takes so many steps less.
        source: An SAE to begin from.
    """
    with torch_settings(torch.device("cpu"), spec.threads or 1):
        parts = spec.parts({spec.hook: task.d_model})
        sae = Sae(task.d_model, spec.latents, spec.k, spec.normalize, parts)
        recipe = Recipe.resolve(spec, task.d_model, task.rows // spec.batch_rows - begin_at)
        run = Run(sae, recipe, loss_constant=1.0)
        weights = torch.ones(spec.batch_rows)
        batches = islice(_passes(task, spec.batch_rows), begin_at, None)
        drawn = list(islice(batches, -(-spec.sample_rows // spec.batch_rows)))
        sample = torch.cat(drawn)[: spec.sample_rows]
        counted = torch.ones(len(sample))
        if source is None:
            run.loss_constant = initialise(
                sae, sample, counted, spec.seed, encoder_norm=spec.first_encoder_norm
            )
        else:
            run.loss_constant = warm_start(sae, source, sample, counted)
        for batch in islice(chain(drawn, batches), recipe.steps):
            train_step(run, batch, weights)
            if advance is not None:
                advance(len(batch))
    return run


def _passes(task: Task, batch_rows: int) -> Iterator[torch.Tensor]:
    """Batches of one pass after another, in the same order."""
    while True:
        yield from map(torch.from_numpy, task.batches(batch_rows))


@torch.no_grad()
def measure(run: Run, task: Task) -> Figures:
    """What `figures_of` says of a finished run's weights, its dead share and its steps with AuxK."""
    if run.batches:
        train = [torch.from_numpy(task.block(number)[0]) for number in range(TEST_BLOCKS)]
        calibrate(run.sae, [(rows, torch.ones(len(rows))) for rows in train])
    figures = figures_of(run.sae, task) | {"dead_share": run.dead_share_of_last_epoch}
    return figures | {"steps": float(run.counts.step), "auxk_steps": float(run.counts.auxk_steps)}


@torch.no_grad()
def figures_of(sae: Sae, task: Task) -> Figures:
    """`recovery` of an SAE's weights, and `fvu` and `l0` on fresh rows of the task."""
    first = -(-task.rows // BLOCK_ROWS)
    fresh = replace(task, rows=(first + TEST_BLOCKS) * BLOCK_ROWS)
    fvu, l0 = Fvu(task.d_model), L0()
    for number in range(first, first + TEST_BLOCKS):
        rows = torch.from_numpy(fresh.block(number)[0])
        fvu.add(rows, sae(rows))
        l0.add(sae.encode(rows)[0])
    return recovery(sae.W_dec.numpy(), task.truth) | {"fvu": fvu.value, "l0": l0.value}
