"""What every part of one step reads and none changes, and the results of a step.

Legend: B rows of this rank, D width of the input, O width of the output, N latents of all shards, M dead
latents of this shard, T targets, E entries of codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from winnow.sae.model import Sae
from winnow.schemas.training import TrainSpec
from winnow.trainer.kernels import Backend
from winnow.trainer.kernels.segment_grad import Segments
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
        return cls.of_layers([run], weights)[0]

    @classmethod
    def of_layers(cls, runs: Sequence[Run], weights: Tensor) -> list[StepContext]:
        """The same for runs that take one step together on the same rows."""
        first = runs[0]
        data, present = first.world.data, weights[weights > 0].to(first.sae.W_enc)
        # one collective for both; the weights are first summed in their own type, so that on one rank the
        # total is exactly their sum
        here = torch.tensor([float(len(present)), present.sum().item()], dtype=torch.float64)
        counts, sums = data.gather(here).unbind(1)
        total = present.new_tensor(sums.sum().item())
        # frozen here for the whole step: micro-batches must agree on who is dead
        dead = [run.dead.silent(run.recipe.dead_after) for run in runs]
        of_shards = first.world.latent.gather(torch.tensor([len(ids) for ids in dead]))
        return [
            cls(
                spec=run.recipe.spec,
                shard=run.shard,
                kernels=run.kernels,
                step=run.counts.step,
                k=run.recipe.k_at(run.counts.step),
                dead=ids,
                dead_of_shards=tuple(of_shards[:, number].tolist()),
                k_aux=run.recipe.k_aux,
                constant=run.loss_constant,
                sparsity=run.recipe.sparsity_at(run.counts.step),
                rows=int(counts.sum()),
                fullest=int(counts.max()),
                total=total,
            )
            for number, (run, ids) in enumerate(zip(runs, dead, strict=True))
        ]

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

    # ---- several targets -----------------------------------------------------------------------------

    @property
    def targets(self) -> int:
        """Targets T, all as wide as D; 1 unless this is a layer of a cross-layer transcoder."""
        return max(1, len(self.ctx.sae.parts.target_widths))

    def by_target(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows [B, O] as one view [B, O/T] per target."""
        return rows.chunk(self.targets, 1)

    def decode_for(self, target: int, values: Tensor, indices: Tensor) -> Tensor:
        """What this shard's codes add to one target [B, O/T]."""
        return self.ops.decode(values, indices * self.targets + target, self._by_target)

    def dots(self, grads: tuple[Tensor, ...], indices: Tensor, segments: Segments) -> Tensor:
        """The gradient of each entry's value [E], from that of the output per target."""
        count = self.targets
        if count == 1:
            return self.ops.dots(grads[0], indices, segments, self.W_dec)
        # target by target: rows and decoders of one target are in cache, those of all are not
        total, W = segments.row.new_zeros(len(segments.row), dtype=self.ctx.total.dtype), self._by_target
        for target, grad in enumerate(grads):
            moved = segments._replace(latent=segments.latent * count + target)
            total += self.ops.dots(grad, indices * count + target, moved, W)
        return total

    @property
    def _by_target(self) -> Tensor:
        """The decoder as [N T, O/T]: row n T + t is what latent n writes to target t, in place."""
        return self.W_dec.view(self.W_dec.shape[0] * self.targets, -1)


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
