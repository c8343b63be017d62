"""A step on a mesh from several micro-batches: `winnow.trainer.step.accumulate` over shards and ranks.

Every rank takes as many micro-batches of its share, some perhaps without a row, so that all meet in the same
collectives. Those over `latent` are a step's, once for each part; over `data` gradients and sums travel once,
after the last part, dense: rows and codes are gone by then.

Legend: b rows of a micro-batch on this rank, D width of the input, O of the output, M dead latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from winnow.sae.model import Sae
from winnow.schemas.training import TrainSpec
from winnow.trainer.kernels import Backend
from winnow.trainer.kernels.step_ops import Dead
from winnow.trainer.mesh.exchange import Gradients, Part, fill
from winnow.trainer.mesh.topk import Codes
from winnow.trainer.mesh.world import World
from winnow.trainer.step.accumulate import AuxK
from winnow.trainer.step.fused import Pass, gradient_buffer
from winnow.trainer.step.losses import Rows
from winnow.trainer.step.parallel_step import Found, Local, Share, finish, forward

Seen = Callable[[Rows, Found], None]
"""Told of every micro-batch and what came of it, while that is in memory."""


@torch.no_grad()
def accumulated_parallel_pass(
    sae: Sae,
    spec: TrainSpec,
    parts: Sequence[Callable[[], Rows]],
    dead: Tensor,
    k_aux: int,
    constant: float,
    backend: Backend,
    world: World,
    share: Share,
    dead_sizes: list[int],
    seen: Seen,
) -> Pass:
    """`parallel_step.parallel_pass` of a batch that comes in parts; its last tensors are empty.

    Args:
        sae: This rank's shard; its `.grad`s are overwritten.
        spec: As for `parallel_pass`, and so what is not said here.
        parts: Each gives a micro-batch of b >= 0 rows; one at a time is held. As many on every rank.
        dead: int64 [M].
        k_aux: Most dead latents a row.
        constant: The loss constant.
        backend: `cpu` or `triton`.
        world: The mesh.
        share: See `Share.of`, of the whole batch.
        dead_sizes: M of every shard.
        seen: See `Seen`.
    """
    shard = Local.of(sae, spec, backend, world, share)
    k_dead = min(k_aux, sum(dead_sizes)) if spec.auxk_coefficient else 0
    wanted = Dead(dead, min(k_dead, len(dead)), dense=False)
    auxk = AuxK(shard.ops, shard.W_dec, wanted, sae.d_model) if k_dead else None
    step = _Step(shard, spec, auxk)
    for part in parts:  # what a part takes is let go with `take`
        step.take(part(), dead, k_dead, dead_sizes, constant, seen)
    return step.end()


class _Step:
    """The sums of a step's micro-batches on this rank.

    Args:
        shard: What every part reads.
        spec: How it is trained.
        auxk: AuxK's sums, where it is on.
    """

    def __init__(self, shard: Local, spec: TrainSpec, auxk: AuxK | None) -> None:
        sae = shard.sae
        self._shard, self._spec, self._auxk = shard, spec, auxk
        self._into = Gradients(*(gradient_buffer(p) for p in (sae.W_dec, sae.W_enc, sae.b_enc)))
        self._pulls = torch.zeros_like(sae.b_pre if sae.b_dec is None else sae.b_dec)
        self._skip = None if sae.W_skip is None else gradient_buffer(sae.W_skip).zero_()
        self._sums = torch.zeros(2, dtype=torch.float64, device=self._pulls.device)  # loss, second rounds
        self._first = True

    def take(
        self,
        batch: Rows,
        dead: Tensor,
        k_dead: int,
        dead_sizes: list[int],
        constant: float,
        seen: Seen,
    ) -> None:
        """Add a micro-batch."""
        shard, spec = self._shard, self._spec
        centred = batch.x - shard.sae.b_pre.detach()
        made: list[Part] = []

        def add(codes: Codes, grad: Tensor) -> None:
            made.append(shard.part(codes, grad))

        groups = spec.groups // spec.accumulate
        found = forward(shard, spec, batch, centred, dead, k_dead, dead_sizes, constant, groups, add)
        seen(batch, found)
        fill(shard.ops, self._into, centred, made, None, first=self._first)
        self._first = False
        for number in found.whole:
            self._pulls += made[number].grad.sum(0)
            if self._skip is not None:
                self._skip.addmm_(made[number].grad.T, batch.x)
        self._sums += torch.stack([found.loss.double(), self._sums.new_tensor(found.second_rounds)])
        if self._auxk is not None and found.dead is not None:
            e_hat = shard.decode(found.dead)
            rows = shard.ops.low(centred)
            self._auxk.add_codes(*found.dead, e_hat, rows, found.error.neg_(), batch.weights)

    def end(self) -> Pass:
        """Join what was kept apart, sum over the ranks, and project."""
        shard, into, coefficient = self._shard, self._into, self._spec.auxk_coefficient
        data, value, finite = shard.world.data, None, True
        if self._auxk is not None:
            value, rows = self._auxk.result(coefficient, data)
            finite = rows is not None
            if rows is not None:
                for name in Gradients._fields:
                    getattr(into, name).index_add_(0, rows.ids, getattr(rows, name))
        travels = [data.sum_start(t) for t in (*into, self._pulls, self._skip, self._sums) if t is not None]
        for travel in travels:
            travel.wait()
        loss, second_rounds = self._sums.tolist()
        norm = finish(shard.sae, shard.world, self._pulls)
        none = self._pulls.new_empty(0)
        total = loss + coefficient * (value or 0.0)
        return Pass(total, value, finite, norm, none, none, none, int(second_rounds))
