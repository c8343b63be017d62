"""What a step reports.

Legend: B rows of this rank, O width of the output, n latents of this shard, K active latents per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.sae import metrics
from winnow.trainer.mesh.world import World
from winnow.trainer.step.context import Taken
from winnow.trainer.step.losses import Rows
from winnow.trainer.step.state import Run

# a float64 copy of this many rows is still in a CPU's cache when it is summed; on a GPU it bounds memory, and
# more rows are fewer launches
TALLIED_ROWS, TALLIED_ROWS_GPU = 256, 8192
"""Rows whose squares are summed in float64 at a time."""


class Tally:
    """Sums over a step's rows, micro-batch by micro-batch, that outlive the rows.

    Args:
        run: The run that takes the step.
        width: O.
    """

    def __init__(self, run: Run, width: int) -> None:
        self._dead = run.dead
        self.fvu = metrics.Fvu(width, run.device)
        self.l0 = metrics.L0()
        self.active = torch.zeros_like(run.dead.since, dtype=torch.uint8)
        """uint8 [n]: 1 if the latent was active."""

    def add(self, batch: Rows, taken: Taken) -> None:
        """Take in a micro-batch."""
        self.active |= self._dead.active(taken.values, taken.indices)
        self.l0.add(taken.values, batch.weights)
        size = TALLIED_ROWS if batch.y.device.type == "cpu" else TALLIED_ROWS_GPU
        parts = (tensor.split(size) for tensor in (batch.y, taken.y_hat, batch.weights))
        for y, y_hat, weights in zip(*parts, strict=True):
            self.fvu.add_present(y, y_hat, weights)


@dataclass(frozen=True)
class StepReport:
    """The results of one step."""

    loss: float
    """The whole loss: reconstruction (over the constant) and AuxK."""
    auxk: float
    grad_norm: float
    """Before clipping, after projection."""
    lr: float
    dead: int
    """Dead latents at the start of the step, of all shards."""
    x: Tensor
    """Normalised rows of weight above 0 as they should be, [B, O]; with the next three, for telemetry."""
    x_hat: Tensor
    values: Tensor
    weights: Tensor
    world: World
    """On a mesh the rows are this rank's, the codes its shard's, and the figures below are collectives."""
    second_rounds: int
    """Rows whose selection took a second round."""
    rows: int
    """Rows of weight above 0 in the whole batch."""
    tally: Tally | None = None
    """Of all micro-batches, if there are several: the tensors above are then empty."""

    @property
    def fvu(self) -> float:
        """FVU of the whole batch in the normalised space."""
        if self.tally is not None:
            sums = self.tally.fvu
        else:
            sums = metrics.Fvu(self.x.shape[1], self.x.device)
            sums.add(self.x, self.x_hat, self.weights)
        # computed when read, not per step: only logged steps are asked, and each asks every rank
        return (sums.over(self.world.data.sum) if self.world.meshed else sums).value

    @property
    def l0(self) -> float:
        """Active latents per row in the whole batch."""
        if self.tally is not None:
            count = self.tally.l0
        else:
            count = metrics.L0()
            count.add(self.values, self.weights)
        if self.world.meshed:
            # each of the S shards counted every row, but only its own latents
            return count.over(self.world.whole.sum).value * self.world.latent.size
        return count.value
