"""The step on a mesh: forward and backward of one shard of the latents and one share of the batch.

Legend: B rows of this rank, D d_model, n latents of this shard, N of all, w entries a row, M dead latents.

The numbers of `trainer.fused.fused_pass`, that is of the eager specification, from four exchanges: the
global top-k and the sum of the shards' reconstructions over `latent`, the gradients and a few sums over
`data`. Everything divides by the weight of the whole batch. b_pre is everywhere: every rank makes the same
gradient for it, and the norm counts it once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from schemas.training import TrainSpec
from trainer.fused import Pass, gradient_buffer, squares, zero_where_cut
from trainer.kernels import Backend
from trainer.kernels.best import sort_pairs
from trainer.kernels.segment_grad import segments_of
from trainer.kernels.step_ops import Dead, StepOps, step_ops
from trainer.optim import project_decoder_gradient
from trainer.parallel import Axis, World
from trainer.parallel_exchange import Gather, Gradients, Part, dense_bytes, fill, rows_bytes
from trainer.parallel_topk import Codes, candidates, count_kept, keep
from trainer.sae import PARAMETERS, Sae


class Share(NamedTuple):
    """This rank's share of the batch, rows of weight 0 left out, among the others'."""

    rows: int
    """Of the whole batch."""
    fullest: int
    """Rows of the rank that has most."""
    weight: float
    """Of the whole batch."""

    @classmethod
    def of(cls, weights: Tensor, data: Axis) -> Share:
        """From this rank's weights [B]; a collective."""
        here = torch.tensor(
            [float(len(weights)), weights.sum(dtype=torch.float64).item()], dtype=torch.float64
        )
        counts, sums = data.gather(here).unbind(1)
        return cls(int(counts.sum()), int(counts.max()), sums.sum().item())


class _Shard(NamedTuple):
    """What every part of the step reads."""

    ops: StepOps
    sae: Sae
    world: World
    share: Share
    weights: Tensor

    def decode(self, codes: Codes) -> Tensor:
        """The reconstruction [B, D] without b_pre, summed over the shards."""
        W_dec = self.sae.W_dec.detach()
        if codes.values.numel():
            x_hat = self.ops.decode(codes.values, codes.indices, W_dec)
        else:
            x_hat = W_dec.new_zeros(len(codes.values), W_dec.shape[1])
        return self.world.latent.sum(x_hat)

    def part(self, codes: Codes, grad: Tensor) -> Part:
        """The codes with their gradient, which is 0 where a negative was cut or a slot is empty."""
        if not codes.values.numel():
            return Part(codes.values, codes.values, codes.indices, grad)
        segments = segments_of(codes.indices, self.sae.latents)
        dots = self.ops.dots(grad, codes.indices, segments, self.sae.W_dec.detach())
        dz = torch.empty_like(dots).index_copy_(0, segments.order, dots).view(codes.values.shape)
        return Part(codes.values, zero_where_cut(dz, codes.values), codes.indices, grad)


@torch.no_grad()
def parallel_pass(
    sae: Sae,
    spec: TrainSpec,
    x: Tensor,
    weights: Tensor,
    dead: Tensor,
    k_aux: int,
    constant: float,
    backend: Backend,
    world: World,
    share: Share,
    dead_sizes: list[int],
) -> Pass:
    """`trainer.fused.fused_pass` on a mesh: fills `.grad` of this shard; every rank gets the same loss.

    Args:
        sae: This rank's shard; its K is the step's.
        spec: `latents`, `multi_topk` and `auxk_coefficient` are read.
        x: This rank's normalised rows [B, D]; B may be 0.
        weights: [B], above 0.
        dead: int64 [M], ascending: the shard's own dead latents.
        k_aux: Most dead latents a row, of all shards.
        constant: See `losses.reconstruction_loss`.
        backend: `cpu` or `triton`.
        world: The mesh.
        share: See `Share.of`.
        dead_sizes: M of every shard.
    """
    shard = _Shard(step_ops(backend), sae, world, share, weights)
    sizes = [len(part) for part in world.parts(spec.latents)]
    k_dead = min(k_aux, sum(dead_sizes)) if spec.auxk_coefficient else 0
    k_wide = min(4 * sae.k, spec.latents) if spec.multi_topk else sae.k

    centred = x - sae.b_pre.detach()
    gather = _start_gather(shard, centred, [k for k in (sae.k, spec.multi_topk * k_wide, k_dead) if k])
    best, best_dead = _encode(shard, centred, min(k_wide, sae.latents), dead, k_dead)
    second_rounds = 0

    def select(values: Tensor, indices: Tensor, k: int, sizes: list[int]) -> Codes:
        nonlocal second_rounds
        found = count_kept(values, k, [min(k, size) for size in sizes], world.latent)
        second_rounds += found.second_rounds
        return keep(values, indices, found.kept)

    codes = select(best.values[:, : sae.k], best.indices, sae.k, sizes)
    x_hat = shard.decode(codes).add_(sae.b_pre)
    error = x_hat - x
    scale = weights / (share.weight * constant)
    loss = scale @ squares(error)
    parts: list[Part] = []

    def add(codes: Codes, grad: Tensor) -> None:
        parts.append(shard.part(codes, grad))
        if gather is not None:
            gather.add(parts[-1])

    add(codes, error * (2 * scale)[:, None])
    if spec.multi_topk:
        wide = select(best.values, best.indices, k_wide, sizes)
        error_wide = shard.decode(wide).add_(sae.b_pre).sub_(x)
        loss += scale @ squares(error_wide) / 8
        add(wide, error_wide.mul_((scale / 4)[:, None]))
    auxk, finite, direct = None, True, len(parts)
    if k_dead:
        dead_codes = select(best_dead.values, best_dead.indices, k_dead, dead_sizes)
        auxk, grad = _auxk(shard, dead_codes, error.neg_(), spec.auxk_coefficient)
        finite = grad is not None
        if grad is not None:
            add(dead_codes, grad)
    sums = torch.stack([loss.double(), loss.new_tensor(second_rounds, dtype=torch.float64)])
    total, second_rounds = world.data.sum(sums).tolist()
    norm = _gradients(shard, centred, parts, direct, gather)
    return Pass(
        total + spec.auxk_coefficient * (auxk or 0.0),
        auxk,
        finite,
        norm,
        x_hat,
        codes.values,
        codes.indices,
        int(second_rounds),
    )


def _encode(shard: _Shard, centred: Tensor, m: int, dead: Tensor, k_dead: int) -> tuple[Codes, Codes]:
    """This shard's best m latents a row, and its best dead ones, in order."""
    kind = centred.dtype
    k_dead = min(k_dead, len(dead))
    if not len(centred):
        empty = centred.new_empty(0, m, dtype=kind), dead.new_empty(0, m)
        empty_dead = centred.new_empty(0, k_dead, dtype=kind), dead.new_empty(0, k_dead)
        return Codes(*empty), Codes(*empty_dead)
    wanted = Dead(dead, k_dead, dense=False) if k_dead else None
    W_enc, b_enc = shard.sae.W_enc.detach(), shard.sae.b_enc.detach()
    values, indices, found = shard.ops.encode(centred, W_enc, b_enc, m, wanted)
    if wanted is None or not isinstance(found, tuple):
        return Codes(values, indices), Codes(values[:, :0], indices[:, :0])
    best, at = sort_pairs(*found)
    return Codes(values, indices), Codes(best, dead[at])


def _auxk(shard: _Shard, codes: Codes, e: Tensor, coefficient: float) -> tuple[float, Tensor | None]:
    """The term of `losses.auxk_loss`, and its gradient by e_hat times `coefficient`; else 0 and None."""
    data, weights = shard.world.data, shard.weights
    mean = data.sum(weights @ e) / shard.share.weight
    error = shard.decode(codes).sub_(e)
    spread = weights @ squares(e - mean)
    left, spread = data.sum(torch.stack([weights @ squares(error), spread])).unbind()
    loss = (left / spread).item()
    if not math.isfinite(loss):
        return 0.0, None
    return loss, error.mul_((2 * coefficient / spread * weights)[:, None])


def _start_gather(shard: _Shard, centred: Tensor, ks: list[int]) -> Gather | None:
    """Begin to gather rows over `data` where that sends less than summing dense gradients."""
    data, latents, d_model = shard.world.data, shard.sae.latents, centred.shape[1]
    if data.size == 1 or shard.world.exchange == "dense":
        return None
    widths = [min(latents, candidates(k, shard.world.latent.size)) for k in ks]
    size = centred.element_size()
    by_rows = rows_bytes(data.size, shard.share.fullest, d_model, widths, size)
    if shard.world.exchange == "auto" and by_rows >= dense_bytes(data.size, latents, d_model, size):
        return None
    return Gather(data, centred, shard.share.fullest)


def _gradients(
    shard: _Shard, centred: Tensor, parts: list[Part], direct: int, gather: Gather | None
) -> float:
    """Fill every `.grad` of this shard, the decoder's projected, and give the norm over all shards.

    The reconstructions of the first `direct` parts hold b_pre.
    """
    sae, world = shard.sae, shard.world
    W_enc, b_enc, W_dec, b_pre = (gradient_buffer(getattr(sae, name)) for name in PARAMETERS)
    if gather is not None:
        centred, parts = gather.result()
    pulls = torch.stack([part.grad.sum(0) for part in parts[:direct]]).sum(0)
    over = None if gather is not None or world.data.size == 1 else world.data
    if over is not None:
        over.sum(pulls)
    fill(shard.ops, Gradients(W_dec, W_enc, b_enc), centred, parts, over)
    torch.sub(pulls, world.latent.sum(b_enc @ sae.W_enc), out=b_pre)
    project_decoder_gradient(sae)
    own = torch.stack([grad.double().square().sum() for grad in (W_enc, b_enc, W_dec)]).sum()
    return (world.latent.sum(own) + b_pre.double().square().sum()).sqrt().item()
