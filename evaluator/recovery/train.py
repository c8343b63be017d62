"""Trains an SAE on rows with known directions, by the trainer's own step, and measures what it found.

Legend: B rows of a batch, D width, N latents, K active latents per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import torch

from winnow.common.device import torch_settings
from winnow.evaluator.recovery.task import BLOCK_ROWS, Task, measure_recovery
from winnow.sae.init import initialise
from winnow.sae.metrics import L0, Fvu
from winnow.sae.model import Sae
from winnow.schemas.base import validate
from winnow.schemas.training import TrainSpec
from winnow.trainer.run.threshold import calibrate
from winnow.trainer.run.warm_start import warm_start
from winnow.trainer.step import Recipe, Run, train_step

DEAD_AFTER = 2000
"""Rows without activation after which a latent is dead: the rarest direction occurs about 10 times in as
many."""
_TEST_BLOCKS = 2
"""Blocks of fresh rows on which FVU and L0 are measured; as many training blocks calibrate a threshold."""
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
"""Variant -> fields of its spec; `fields_of` adds those that depend on its sizes. The task has no hierarchy
for Matryoshka's prefixes to find, so their cost is shown. `topk-pruned` is trained in two runs
(`train_variant`)."""
FIRST_LR = 0.01
"""Learning rate at which the search begins for every variant and every library (`recovery.page.next_lr`)."""


def fields_of(variant: str, latents: int, k: int) -> dict[str, Any]:
    """Return the fields of a variant's spec at one size: `VARIANTS`, Matryoshka's prefixes, the first K."""
    if variant == "matryoshka":
        return VARIANTS[variant] | {"matryoshka": (latents // 4, latents // 2)}
    if variant == "topk-anneal":
        return VARIANTS[variant] | {"k_start": min(4 * k, latents)}
    return VARIANTS[variant]


def spec_of(task: Task, latents: int, k: int, **fields: Any) -> TrainSpec:
    """Make a spec for a task: dataset normalisation, small batches, one pass. `fields` take precedence.

    Raises:
        ConfigError: A spec has no such field, or fields contradict each other.
    """
    base = {
        "out": "synthetic",
        "hook": "synthetic",
        "latents": latents,
        "k": k,
        "normalize": "dataset",
        # As in all committed results. 0.5, the trainer's default, makes no difference here that three seeds
        # can show: `match` is 1.02 on these rows.
        "encoder_norm": "match",
        "batch_rows": 512,
        "lr": FIRST_LR,
        "dead_after_tokens": DEAD_AFTER,
        "seed": task.seed,
        # So that results depend neither on the number of cores nor on an accelerator.
        "device": "cpu",
        "threads": 1,
    }
    return validate(TrainSpec, base | fields, origin="the variant")


def train_variant(variant: str, task: Task, latents: int, k: int, **fields: Any) -> Run:
    """Train a variant on `task.rows` rows, each once.

    `topk-pruned` trains twice the latents on the first half of the rows, and the better half of these on the
    second (`train.init_from`): 1.5 times the products of the others.
    """
    spec = spec_of(task, latents, k, **fields, **fields_of(variant, latents, k))
    if variant != "topk-pruned":
        return train_on(task, spec)
    # The second run continues in the stream where the first ended, so that no row is seen twice.
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
        advance: Called with the number of rows after every step.
        begin_at: Batches to skip at the beginning of the task; the run takes that many steps less.
        source: An SAE to begin from.
    """
    with torch_settings(torch.device("cpu"), spec.threads or 1):
        parts = spec.parts({spec.hook: task.d_model})
        sae = Sae(task.d_model, spec.latents, spec.k, spec.normalize, parts)
        recipe = Recipe.resolve(spec, task.d_model, task.rows // spec.batch_rows - begin_at)
        run = Run(sae, recipe, loss_constant=1.0)
        weights = torch.ones(spec.batch_rows)
        batches = islice(_passes(task, spec.batch_rows), begin_at, None)
        # The rows of the initial sample are also the first that are trained on, since each is to be seen
        # once.
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
    """Yield the batches of one pass after another, in the same order."""
    while True:
        yield from map(torch.from_numpy, task.batches(batch_rows))


@torch.no_grad()
def measure_run(run: Run, task: Task) -> Figures:
    """Compute the figures of a finished run's weights, its dead share and its steps with AuxK."""
    # BatchTopK has no selection over a batch outside training, only a threshold, which is calibrated first.
    if run.batches:
        train = [torch.from_numpy(task.block(number)[0]) for number in range(_TEST_BLOCKS)]
        calibrate(run.shard, [(rows, torch.ones(len(rows))) for rows in train])
    figures = figures_of(run.sae, task) | {"dead_share": run.dead_share_of_last_epoch}
    return figures | {"steps": float(run.counts.step), "auxk_steps": float(run.counts.auxk_steps)}


@torch.no_grad()
def figures_of(sae: Sae, task: Task) -> Figures:
    """Compute the recovery of an SAE's weights, and `fvu` and `l0` on fresh rows of the task."""
    # Blocks after the last one that was trained on: the same mixture, other rows.
    first = -(-task.rows // BLOCK_ROWS)
    fresh = replace(task, rows=(first + _TEST_BLOCKS) * BLOCK_ROWS)
    fvu, l0 = Fvu(task.d_model), L0()
    for number in range(first, first + _TEST_BLOCKS):
        rows = torch.from_numpy(fresh.block(number)[0])
        fvu.add(rows, sae(rows))
        l0.add(sae.encode(rows)[0])
    return measure_recovery(sae.W_dec.numpy(), task.truth) | {"fvu": fvu.value, "l0": l0.value}
