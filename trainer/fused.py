"""The gradients of a training step without a dense product beside the encoder's.

The same numbers as `trainer.step.eager_pass` (the specification) up to rounding, by hand instead of by
autograd: the gradients share one sort of the codes, are made in blocks of latents that stay in cache
while they are projected and measured, and land in buffers that live as long as the run.

Legend: B rows, D d_model, N latents, K active latents a row, M dead latents, E entries of codes.

With g the gradient of the reconstruction and z the codes: dW_dec = scatter(z)^T g, dz = (g W_dec^T) at
the codes' places and 0 where a negative was cut, dW_enc = scatter(dz)^T (x - b_pre), db_enc = sum_b dz,
db_pre = sum_b g - db_enc W_enc. The product takes x - b_pre, a copy of [B, D], where the specification
folds b_pre into b: that would read W_enc once more, and N is the larger.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from schemas.training import TrainSpec
from trainer.kernels import Backend
from trainer.kernels.best import best
from trainer.kernels.encode_topk import ROW_TILE, cuts_of, grad_bias
from trainer.kernels.segment_grad import Segments, segments_of
from trainer.kernels.step_ops import Dead, StepOps, step_ops
from trainer.losses import mean_row
from trainer.sae import PARAMETERS, Sae
from trainer.spans import mark

DENSE_AUX = 12
"""AuxK works on dense [B, M] up to this many dead latents for each one kept: a gathered multiplication
costs about as much as twelve of a product. Beyond, on codes."""


class Pass(NamedTuple):
    """One forward and backward pass; the gradients are in the parameters' `.grad`."""

    loss: float
    """The whole loss."""
    auxk: float | None
    """The AuxK term, 0 where it was not finite; None where it was not active."""
    auxk_finite: bool
    grad_norm: float | None
    """Of all gradients, the decoder's already projected; None where that is still to do."""
    x_hat: Tensor
    values: Tensor
    indices: Tensor
    second_rounds: int = 0
    """On a mesh: rows whose top-k took a second round over the shards."""


class _Part(NamedTuple):
    """Codes that one gradient flows through."""

    values: Tensor
    indices: Tensor
    grad: Tensor
    """[B, D]: of the reconstruction made from these codes."""


class _DeadRows(NamedTuple):
    """What dense AuxK adds to the dead latents' gradients."""

    ids: Tensor
    W_dec: Tensor
    W_enc: Tensor
    b_enc: Tensor


class _Aux(NamedTuple):
    loss: float
    part: _Part | None
    rows: _DeadRows | None


@torch.no_grad()
def fused_pass(
    sae: Sae,
    spec: TrainSpec,
    x: Tensor,
    weights: Tensor,
    dead: Tensor,
    k_aux: int,
    constant: float,
    backend: Backend,
) -> Pass:
    """Loss, and every gradient with the decoder's projected.

    Args:
        sae: The model; its `.grad`s are overwritten.
        spec: `k`, `multi_topk` and `auxk_coefficient` are read.
        x: Normalised rows [B, D], B >= 1.
        weights: [B], above 0.
        dead: int64 [M], ascending.
        k_aux: Most dead latents a row.
        constant: See `losses.reconstruction_loss`.
        backend: `cpu` or `triton`.
    """
    ops = step_ops(backend)
    W_enc, b_enc, W_dec, b_pre = (getattr(sae, name).detach() for name in PARAMETERS)
    centred = x - b_pre
    wanted = None
    if spec.auxk_coefficient and len(dead):
        k = min(k_aux, len(dead))
        wanted = Dead(dead, k, dense=len(dead) <= DENSE_AUX * k)
    k_wide = min(4 * sae.k, sae.latents) if spec.multi_topk else sae.k
    wide, indices_wide, z_dead = ops.encode(centred, W_enc, b_enc, k_wide, wanted)
    mark("encode")
    wide.relu_()
    values, indices = wide[:, : sae.k].contiguous(), indices_wide[:, : sae.k].contiguous()

    scale = weights / (weights.sum() * constant)
    x_hat = ops.decode(values, indices, W_dec).add_(b_pre)
    error = x_hat - x
    loss = scale @ squares(error)
    parts = [_Part(values, indices, error * (2 * scale)[:, None])]
    if spec.multi_topk:
        error_wide = ops.decode(wide, indices_wide, W_dec).add_(b_pre).sub_(x)
        loss += scale @ squares(error_wide) / 8
        parts.append(_Part(wide, indices_wide, error_wide.mul_((scale / 4)[:, None])))
    pulls_b_pre = torch.stack([part.grad.sum(0) for part in parts]).sum(0)

    aux = None
    if wanted is not None and z_dead is not None:
        aux = _auxk(ops, W_dec, wanted, z_dead, centred, error.neg_(), weights, spec.auxk_coefficient)
        loss += spec.auxk_coefficient * aux.loss
        parts += [aux.part] if aux.part else []
    mark("decode")
    norm = _gradients(ops, sae, parts, aux.rows if aux else None, centred, pulls_b_pre)
    mark("backward")
    finite = aux is None or aux.part is not None or aux.rows is not None
    return Pass(loss.item(), aux.loss if aux else None, finite, norm, x_hat, values, indices)


def _auxk(
    ops: StepOps,
    W_dec: Tensor,
    dead: Dead,
    z: Tensor | tuple[Tensor, Tensor],
    centred: Tensor,
    e: Tensor,
    weights: Tensor,
    coefficient: float,
) -> _Aux:
    """See `losses.auxk_loss`; `coefficient` is in the gradients, not in the loss."""
    if isinstance(z, Tensor):
        keep_best(z, dead.k)
        W_dead = W_dec[dead.ids]
        loss, grad = _aux_error(z @ W_dead, e, weights, coefficient)
        if grad is None:
            return _Aux(loss, None, None)
        dz = zero_where_cut(grad @ W_dead.T, z)
        return _Aux(loss, None, _DeadRows(dead.ids, z.T @ grad, dz.T @ centred, dz.sum(0)))
    values, indices = z[0].relu_(), dead.ids[z[1]]
    loss, grad = _aux_error(ops.decode(values, indices, W_dec), e, weights, coefficient)
    return _Aux(loss, None if grad is None else _Part(values, indices, grad), None)


def _aux_error(e_hat: Tensor, e: Tensor, weights: Tensor, coefficient: float) -> tuple[float, Tensor | None]:
    """The AuxK term and `coefficient` times its gradient by e_hat; 0 and None where not finite."""
    spread = weights @ squares(e - mean_row(e, weights))
    error = e_hat.sub_(e)
    loss = (weights @ squares(error) / spread).item()
    if not math.isfinite(loss):
        return 0.0, None
    return loss, error.mul_((2 * coefficient / spread * weights)[:, None])


def squares(rows: Tensor) -> Tensor:
    """`rows.square().sum(1)` [B] of rows [B, D], in one pass over memory."""
    return torch.einsum("bd,bd->b", rows, rows)


def zero_where_cut(grad: Tensor, values: Tensor) -> Tensor:
    """The gradient through a cut of negatives to 0: 0 where values are not above 0; in place."""
    return torch.ops.aten.threshold_backward.grad_input(grad, values, 0, grad_input=grad)


def keep_best(z: Tensor, k: int) -> None:
    """Cut z [B, M] to the best k of each row that are above 0, in place."""
    for part in z.split(ROW_TILE):
        if k < z.shape[1] and int((part > 0).sum(1).max()) > k:
            values, at = best(part, k)
            part.zero_().scatter_(1, at, values)
        part.relu_()


def _gradients(
    ops: StepOps, sae: Sae, parts: list[_Part], dead: _DeadRows | None, centred: Tensor, pulls_b_pre: Tensor
) -> float:
    """Fill every `.grad`, the decoder's projected, and give their joint norm."""
    W_enc, b_enc, W_dec, b_pre = (gradient_buffer(getattr(sae, name)) for name in PARAMETERS)
    sorted_parts: list[tuple[Segments, Tensor, Tensor, Tensor]] = []
    b_enc.zero_()
    for part in parts:
        segments = segments_of(part.indices, sae.latents)
        values = part.values.flatten()[segments.order]
        dz = ops.dots(part.grad, part.indices, segments, sae.W_dec.detach())
        dz = zero_where_cut(dz, values)
        b_enc += grad_bias(dz, segments.latent, sae.latents)
        sorted_parts.append((segments, values, part.grad, dz))
    if dead is not None:
        b_enc.index_add_(0, dead.ids, dead.b_enc)
    torch.sub(pulls_b_pre, b_enc @ sae.W_enc, out=b_pre)

    norms = [b_enc.norm(), b_pre.norm()]
    blocks = ops.blocks(sae.latents, centred)
    cuts = cuts_of(dead.ids, [0, *(block.stop for block in blocks)]) if dead is not None else []
    for number, block in enumerate(blocks):
        decoder = _sum([ops.sums(values, s, grad, block) for s, values, grad, _ in sorted_parts])
        encoder = _sum([ops.sums(dz, s, centred, block) for s, _, _, dz in sorted_parts])
        if dead is not None:
            some = slice(cuts[number], cuts[number + 1])
            decoder.index_add_(0, dead.ids[some] - block.start, dead.W_dec[some])
            encoder.index_add_(0, dead.ids[some] - block.start, dead.W_enc[some])
        directions = sae.W_dec[block]
        along = torch.einsum("nd,nd->n", decoder, directions)
        decoder.addcmul_(directions, along[:, None], value=-1.0)
        norms += [decoder.norm(), encoder.norm()]
        W_dec[block] = decoder
        W_enc[block] = encoder
    return torch.stack(norms).norm().item()


def _sum(tensors: list[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total += tensor
    return total


def gradient_buffer(parameter: Tensor) -> Tensor:
    """The parameter's `.grad`, which lives from step to step."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
