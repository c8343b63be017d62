"""What every part of one step reads and none changes, and the results of a step.

Legend: B rows of this rank, D width of the input, O width of the output, N latents of all shards, M dead
latents of this shard, T targets, E entries of codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from winnow.sae.model import Sae
from winnow.schemas.training import TrainSpec
from winnow.trainer.kernels import Backend
from winnow.trainer.kernels.fused_ops import WIDEST, FusedOps
from winnow.trainer.kernels.segment_grad import Segments
from winnow.trainer.kernels.step_ops import StepOps, step_ops
from winnow.trainer.mesh.shard import Shard
from winnow.trainer.mesh.world import World
from winnow.trainer.step.rounded import RoundedWeights
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
    rounded: RoundedWeights
    """The run's copies of its matrices, if its kernels keep any."""

    @classmethod
    def of(cls, run: Run, weights: Tensor) -> StepContext:
        """For the next step of a run on this rank's weights [B], on the host; a collective over both axes."""
        return cls.of_layers([run], weights)[0]

    @classmethod
    def of_layers(cls, runs: Sequence[Run], weights: Tensor) -> list[StepContext]:
        """The same for runs that take one step together on the same rows."""
        first = runs[0]
        data, present = first.world.data, weights[weights > 0].to(first.sae.W_enc.dtype)
        # one collective for both; the weights are first summed in their own type, so that on one rank the
        # total is exactly their sum
        here = torch.tensor([float(len(present)), present.sum().item()], dtype=torch.float64)
        counts, sums = data.gather(here).unbind(1)
        # filled, not copied: a number that the host copies to a GPU waits for its queue
        total = first.sae.b_enc.new_full((), sums.sum().item())
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
                rounded=run.rounded,
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


def takes(sae: Sae) -> bool:
    """Whether `FusedOps` are made for matrices of this width and type."""
    width = max(sae.d_model, sae.d_out // targets_of(sae))
    return width <= WIDEST and sae.W_enc.dtype == torch.float32


def targets_of(sae: Sae) -> int:
    """Targets T, all as wide as D; 1 unless this is a layer of a cross-layer transcoder."""
    return max(1, len(sae.parts.target_widths))


class Model(NamedTuple):
    """A step's facts, and its matrices as the backend's operations take them."""

    ctx: StepContext
    ops: StepOps
    W_enc: Tensor
    W_dec: Tensor
    fused: FusedOps | None
    """Kernels that do several parts at once, if the backend has them and rows are not too wide for them."""

    @classmethod
    def of(cls, ctx: StepContext) -> Model:
        """For one step: the weights must not change meanwhile."""
        # rounded once per step, not once per product, or by the update that wrote them
        ops, sae = step_ops(ctx.kernels, ctx.spec.compute_dtype, ctx.spec.float32_products), ctx.sae
        fused = ops.fused if takes(sae) else None
        if fused is None:
            return cls(ctx, ops, ops.low(sae.W_enc.detach()), ops.low(sae.W_dec.detach()), None)
        W_enc, W_dec = (
            ctx.rounded.of(name, getattr(sae, name).detach(), ops.low) for name in ("W_enc", "W_dec")
        )
        return cls(ctx, ops, W_enc, W_dec, fused)

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
        """See `targets_of`."""
        return targets_of(self.ctx.sae)

    @property
    def at_once(self) -> FusedOps | None:
        """`fused`, if there is one target, which is what the kernel that reconstructs knows."""
        return self.fused if self.targets == 1 else None

    def by_target(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows [B, O] as one view [B, O/T] per target."""
        return rows.chunk(self.targets, 1)

    def add_for(self, target: int, y_hat: Tensor, values: Tensor, indices: Tensor) -> None:
        """Add what this shard's codes give one target to its prediction [B, O/T]."""
        places = indices * self.targets + target
        if self.fused is None:
            y_hat += self.ops.decode(values, places, self._by_target)
        else:
            self.fused.add_decoded(y_hat, values, places, self._by_target)

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


class Ending:
    """The end of a step, whose gradients are in `.grad` and whose numbers are on the device.

    `send` starts their way to the host; more work can be given to the device before `read` waits for them.

    Args:
        loss: The loss without AuxK [], of all rows.
        norm: As in `Outcome` [].
        auxk: The AuxK term [], finite or not; None if it was not active.
        coefficient: Of the AuxK term in the loss.
        second_rounds: As in `Outcome`.
    """

    def __init__(
        self, loss: Tensor, norm: Tensor, auxk: Tensor | None, coefficient: float, second_rounds: int
    ) -> None:
        self.loss, self.norm = loss, norm
        self._auxk, self._second_rounds = auxk, second_rounds
        if auxk is not None:
            # in double precision, as the host would multiply
            term = torch.where(auxk.isfinite(), auxk, 0.0).double() * coefficient
            self.loss = loss + term.to(loss.dtype)
        self._host: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    @classmethod
    def known(cls, found: Outcome) -> Ending:
        """That of a step whose numbers the host has."""
        loss, norm = torch.tensor([found.loss, found.grad_norm], dtype=torch.float64)
        auxk = None if found.auxk is None else loss.new_tensor(found.auxk if found.auxk_finite else math.nan)
        # the loss has the term already
        return cls(loss, norm, auxk, 0.0, found.second_rounds)

    def send(self, *more: Tensor) -> None:
        """Start to copy the numbers to the host, with further integers []."""
        auxk = self.loss if self._auxk is None else self._auxk
        # float64 holds integers up to 2**53
        given = (self.loss, self.norm, auxk, *more)
        numbers = torch.stack([number.to(self.loss.device, torch.float64) for number in given])
        # a ledger's tensors are on a GPU that need not be there
        if numbers.is_cuda and torch.cuda.is_available():
            # a copy to pinned memory does not wait, and the event stands before what is queued after it
            self._host = torch.empty(len(numbers), dtype=torch.float64, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._host = numbers

    def read(self) -> tuple[Outcome, list[int]]:
        """Wait for what was sent: the outcome, and the further integers."""
        if self._host is None:
            self.send()
        assert self._host is not None
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, norm, auxk, *more = self._host.tolist()
        finite = self._auxk is None or math.isfinite(auxk)
        value = None if self._auxk is None else (auxk if finite else 0.0)
        return Outcome(loss, value, finite, norm, self._second_rounds), [int(number) for number in more]
