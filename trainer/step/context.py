"""What every part of one step reads and none changes, and the results of a step.

Legend: B rows of this rank, D width of the input, O width of the output, N latents of all shards, M dead
latents of this shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from winnow.sae.model import Sae
from winnow.schemas.training import TrainSpec
from winnow.trainer.kernels import Backend
from winnow.trainer.kernels.step_ops import StepOps, step_ops
from winnow.trainer.mesh.shard import Shard
from winnow.trainer.mesh.world import World
from winnow.trainer.step.state import Run


@dataclass(frozen=True)
class StepContext:
    """One step's facts, the same on every rank except for its shard and dead latents."""

    spec: TrainSpec
    shard: Shard
    kernels: Backend
    step: int
    """Its number, from 0."""
    k: int
    """Latents kept per row in this step; falls to the spec's K if `k_start` is set."""
    dead: Tensor
    """int64 [M], ascending: this shard's dead latents, frozen for the whole step."""
    dead_of_shards: tuple[int, ...]
    """M of each shard."""
    k_aux: int
    """Most dead latents per row, of all shards."""
    constant: float
    """See `losses.reconstruction_loss`."""
    sparsity: float
    """Weight of the activation's sparsity term at this step."""
    rows: int
    """Rows of weight above 0 in the whole batch."""
    fullest: int
    """The largest number of such rows on a rank."""
    total: Tensor
    """Weight of the whole batch []: what every sum is divided by."""

    @classmethod
    def of(cls, run: Run, weights: Tensor) -> StepContext:
        """For the next step of a run on this rank's weights [B]; a collective over both axes."""
        data, present = run.world.data, weights[weights > 0].to(run.sae.W_enc)
        # one collective for both; the weights are first summed in their own type, so that on one rank the
        # total is exactly their sum
        here = torch.tensor([float(len(present)), present.sum().item()], dtype=torch.float64)
        counts, sums = data.gather(here).unbind(1)
        # frozen here for the whole step: micro-batches must agree on who is dead
        dead = run.dead.silent(run.recipe.dead_after)
        dead_of_shards = run.world.latent.gather(torch.tensor(len(dead))).tolist()
        return cls(
            spec=run.recipe.spec,
            shard=run.shard,
            kernels=run.kernels,
            step=run.counts.step,
            k=run.recipe.k_at(run.counts.step),
            dead=dead,
            dead_of_shards=tuple(dead_of_shards),
            k_aux=run.recipe.k_aux,
            constant=run.loss_constant,
            sparsity=run.recipe.sparsity_at(run.counts.step),
            rows=int(counts.sum()),
            fullest=int(counts.max()),
            total=present.new_tensor(sums.sum().item()),
        )

    @property
    def sae(self) -> Sae:
        """This rank's latents."""
        return self.shard.sae

    @property
    def world(self) -> World:
        """The mesh."""
        return self.shard.world

    @property
    def k_dead(self) -> int:
        """Dead latents kept per row, of all shards; 0 if AuxK is off or none is dead."""
        # of all shards, so that every rank decides alike whether AuxK's collectives happen
        return min(self.k_aux, sum(self.dead_of_shards)) if self.spec.auxk_coefficient else 0

    @property
    def groups(self) -> int:
        """BatchTopK's groups in a micro-batch, on all ranks."""
        return self.spec.groups // self.spec.accumulate

    def kept_of_shards(self, k: int) -> list[int]:
        """How many of the best k each shard can have at most."""
        return [min(k, len(part)) for part in self.world.parts(self.spec.latents)]


class Model(NamedTuple):
    """A step's facts, and its matrices as the backend's operations take them."""

    ctx: StepContext
    ops: StepOps
    W_enc: Tensor
    W_dec: Tensor

    @classmethod
    def of(cls, ctx: StepContext) -> Model:
        """For one step: the weights must not change meanwhile."""
        # rounded once per step, not once per product
        ops = step_ops(ctx.kernels, ctx.spec.compute_dtype)
        return cls(ctx, ops, ops.low(ctx.sae.W_enc.detach()), ops.low(ctx.sae.W_dec.detach()))

    def decode(self, values: Tensor, indices: Tensor, W_dec: Tensor | None = None) -> Tensor:
        """The output [B, O] without its bias, summed over the shards."""
        W_dec = self.W_dec if W_dec is None else W_dec
        if values.numel():
            y_hat = self.ops.decode(values, indices, W_dec)
        else:
            # not skipped: a shard without codes or a rank without rows still takes part in the sum
            y_hat = values.new_zeros(len(values), W_dec.shape[1])
        return self.ctx.world.latent.sum(y_hat)


class Taken(NamedTuple):
    """The reconstruction and codes of a micro-batch, whose rows are not kept."""

    y_hat: Tensor
    """[B, O]."""
    values: Tensor
    """This shard's codes, as `indices`."""
    indices: Tensor


class Outcome(NamedTuple):
    """What a whole step found; the gradients are in the parameters' `.grad`, the decoder's projected."""

    loss: float
    """The whole loss, of all rows."""
    auxk: float | None
    """The AuxK term; 0 if it was not finite, None if it was not active."""
    auxk_finite: bool
    grad_norm: float
    """Of all gradients of all shards except those of thresholds, whose scale is the bandwidth's."""
    second_rounds: int = 0
    """Rows whose selection took a second round."""
