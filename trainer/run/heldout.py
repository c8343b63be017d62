"""The trainer's own figures on the held-out windows, and the candidates that they are measured on.

Legend: B rows at a time, D width of the input, O width of the output.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from winnow.common.reporter import Progress
from winnow.sae.metrics import L0, Fvu
from winnow.schemas.training import TrainSpec
from winnow.store import ActivationStore
from winnow.store.read.readings import none_held_out
from winnow.trainer.mesh.shard import Shard
from winnow.trainer.mesh.world import World
from winnow.trainer.step import Run

log = logging.getLogger("winnow.trainer")
T = TypeVar("T")

CHUNK_ROWS = 8192
"""Rows read and reconstructed at a time."""
_CALIBRATION_ROWS = 65_536
"""Training rows from which BatchTopK's threshold is computed, rounded up to whole units."""


def _heldout_rows(
    dataset: ActivationStore, *hooks: str, target: str | None = None, units: range | None = None
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Yield all rows of the validation units in stored order.

    Args:
        dataset: The dataset.
        *hooks: Hooks of the input; the rows of several are joined.
        target: A transcoder's target hook.
        units: Units to read in place of the validation units.

    Yields:
        Raw input rows [B, D], raw target rows [B, O] or None, weights [B].
    """
    units = dataset.plan.split_units("validation") if units is None else units
    size = dataset.plan.rows_per_unit
    together = [*hooks, *([target] if target else [])]
    for first, stop in chunks(units, size, CHUNK_ROWS):
        read = {hook: torch.from_numpy(dataset.read_rows(hook, first, stop)) for hook in together}
        parts = [read[hook] for hook in hooks]
        rows = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        # of all hooks together: a row that is a sink at any of them has weight 0, as in training
        weights = torch.from_numpy(dataset.weights(together, first, stop))
        yield rows, read[target] if target else None, weights


def chunks(units: range, size: int, step: int) -> Iterator[tuple[int, int]]:
    """Cut the rows of units of `size` rows into pieces of at most `step`: first row, and the next one's."""
    for first in range(units.start * size, units.stop * size, step):
        yield first, min(first + step, units.stop * size)


def shown(batches: Iterator[T], dataset: ActivationStore, rows: Callable[[T], int]) -> Iterator[T]:
    """Pass on batches of the held-out rows, and show how far they are; `rows` counts those of a batch."""
    whole = len(dataset.plan.split_units("validation")) * dataset.plan.rows_per_unit
    with Progress("held out", whole, "rows") as progress:
        for batch in batches:
            yield batch
            progress.advance(rows(batch))


def of_all_shards(l0: L0, world: World) -> float:
    """The L0 of all shards' latents together, given that of this one's; a collective over the latent axis."""
    # every shard counted the rows, so the sum over shards has counted them `size` times
    return l0.over(world.latent.sum).value * world.latent.size


class _Totals:
    """Both FVUs and the L0 of one SAE, or of this rank's part of it."""

    def __init__(self, shard: Shard) -> None:
        sae, device = shard.sae, shard.sae.W_enc.device
        self.shard, self.l0 = shard, L0()
        self.normalised, self.raw = Fvu(sae.d_out, device), Fvu(sae.d_out, device)

    def add(self, rows: Tensor, wanted: Tensor | None, weights: Tensor) -> None:
        """Count raw rows [B, D], a transcoder's raw target [B, O] and weights [B]."""
        sae = self.shard.sae
        x, scale = sae.normalise(rows)
        y = x if wanted is None else sae.normalise_target(wanted)
        values, indices = self.shard.select(x)
        y_hat = self.shard.reconstruct(values, indices, x)
        self.normalised.add(y, y_hat, weights)
        self.raw.add(rows if wanted is None else wanted, sae.restore(y_hat, scale), weights)
        self.l0.add(values, weights)

    def figures(self) -> dict[str, float]:
        """See `heldout_figures`."""
        active = of_all_shards(self.l0, self.shard.world)
        return {"fvu_normalised": self.normalised.value, "fvu_raw": self.raw.value, "l0": active}


@torch.no_grad()
def heldout_figures(
    shards: Sequence[Shard], dataset: ActivationStore, *hooks: str, target: str | None = None
) -> list[dict[str, float]]:
    """Measure `fvu_normalised`, `fvu_raw` and `l0` of each SAE on the held-out rows of weight above 0.

    Arguments as for `_heldout_rows`. For a transcoder, both FVUs are those of its target.

    Raises:
        IntegrityError: There is no such row, or a stored one is damaged.
        ConfigError: Rows were chosen, and none is held out.
    """
    world, device = shards[0].world, shards[0].sae.W_enc.device
    totals = [_Totals(shard) for shard in shards]
    batches = shown(_heldout_rows(dataset, *hooks, target=target), dataset, lambda batch: len(batch[0]))
    for rows, wanted, weights in world.each(batches):
        moved = rows.to(device), None if wanted is None else wanted.to(device), weights.to(device)
        for total in totals:
            total.add(*moved)
    if not totals[0].normalised.rows:
        raise none_held_out(dataset.reading)
    return [total.figures() for total in totals]


def calibration_rows(
    dataset: ActivationStore, spec: TrainSpec, *, share: int = 1
) -> list[tuple[Tensor, Tensor]]:
    """Read about CALIBRATION_ROWS / share training rows and their weights for BatchTopK's threshold.

    If a ring has deleted every training unit, the held-out rows are taken, with a warning.
    """
    # any units will do, because windows are shuffled before they are cut into units
    gone = dataset.deleted_units()
    train = [unit for unit in reversed(dataset.plan.split_units("train")) if unit not in gone]
    if not train:
        log.warning("the training rows are deleted: the threshold is taken from the held-out rows")
        train = list(dataset.plan.split_units("validation"))
    wanted = -(-_CALIBRATION_ROWS // (share * dataset.plan.rows_per_unit))
    found: list[tuple[Tensor, Tensor]] = []
    for unit in train[:wanted]:
        for rows, _, weights in _heldout_rows(dataset, *spec.input_hooks, units=range(unit, unit + 1)):
            found.append((rows, weights))
    return found


def candidate_saes(run: Run) -> dict[str, Shard]:
    """The finished run's SAEs: `raw` (the weights as they are) and `ema`, if an average is kept."""
    found = {"raw": run.shard}
    if run.ema is not None:
        found["ema"] = run.shard.having(run.sae.tensors() | run.ema.weights())
    return found
