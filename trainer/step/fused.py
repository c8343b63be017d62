"""The gradients of a training step without a dense product beside the encoder's.

The same numbers as `winnow.trainer.step.step.eager_pass` (the specification) up to rounding, by hand instead
of by
autograd: the gradients share one sort of the codes, are made in blocks of latents that stay in cache
while they are projected and measured, and land in buffers that live as long as the run.

Legend: B rows, D width of the input, O width of the output, N latents, K active latents a row, S slots of
padded codes, M dead latents, E entries of codes.

With g the gradient of the reconstruction and z the codes: dW_dec = scatter(z)^T g, dz = (g W_dec^T) at
the codes' places and 0 where a negative was cut, dW_enc = scatter(dz)^T (x - b_pre), db_enc = sum_b dz,
db_pre = sum_b g - db_enc W_enc. The product takes x - b_pre, a copy of [B, D], where the specification
folds b_pre into b: that would read W_enc once more, and N is the larger.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.sae.codes import best_of_groups
from winnow.sae.metrics import mean_row
from winnow.sae.model import PARAMETERS, Sae
from winnow.schemas.training import TrainSpec
from winnow.trainer.kernels import Backend
from winnow.trainer.kernels.best import best
from winnow.trainer.kernels.encode_topk import ROW_TILE, cuts_of, grad_bias
from winnow.trainer.kernels.segment_grad import Segments, segments_of
from winnow.trainer.kernels.step_ops import Dead, StepOps, step_ops
from winnow.trainer.step.losses import Rows
from winnow.trainer.step.spans import mark

DENSE_AUX = 12
"""AuxK works on dense [B, M] up to this many dead latents for each one kept: a gathered multiplication
costs about as much as twelve of a product. Beyond, on codes."""
BATCH_CANDIDATES = 4
"""BatchTopK looks at this many times K latents of each row before it looks at all of a row."""


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


class Model(NamedTuple):
    """An SAE, and the matrices that a step multiplies by, as its operations take them."""

    ops: StepOps
    sae: Sae
    W_enc: Tensor
    W_dec: Tensor

    @classmethod
    def of(cls, sae: Sae, spec: TrainSpec, backend: Backend) -> Model:
        """For one step: the weights must not change meanwhile."""
        ops = step_ops(backend, spec.compute_dtype)
        return cls(ops, sae, ops.low(sae.W_enc.detach()), ops.low(sae.W_dec.detach()))


class EntryPart(NamedTuple):
    """Codes that one gradient flows through."""

    values: Tensor
    indices: Tensor
    grad: Tensor
    """[B, O]: of the reconstruction made from these codes."""
    chosen: Tensor | None = None
    """bool [B, S]: the entries it flows through; null for all."""


class _Sorted(NamedTuple):
    """A part's entries by latent."""

    segments: Segments
    values: Tensor
    grad: Tensor
    dz: Tensor

    def reaches(self, block: slice) -> bool:
        """Whether any entry lies in a block of latents."""
        ends = self.segments.ends
        return bool(ends[block.start] < ends[block.stop])


class DeadRows(NamedTuple):
    """What dense AuxK adds to the dead latents' gradients."""

    ids: Tensor
    W_dec: Tensor
    W_enc: Tensor
    b_enc: Tensor


class Forward(NamedTuple):
    """What a batch gives before AuxK and the gradients."""

    loss: Tensor
    parts: list[EntryPart]
    pulls: Tensor
    """[B, O]: gradient of the whole output."""
    centred: Tensor
    error: Tensor
    """[B, O]: y_hat - y."""
    dead: Tensor | tuple[Tensor, Tensor] | None
    """As in `step_ops.Codes`."""
    y_hat: Tensor
    values: Tensor
    indices: Tensor


class _Aux(NamedTuple):
    loss: float
    part: EntryPart | None
    rows: DeadRows | None


@torch.no_grad()
def fused_pass(
    sae: Sae,
    spec: TrainSpec,
    batch: Rows,
    dead: Tensor,
    k_aux: int,
    constant: float,
    backend: Backend,
) -> Pass:
    """Loss, and every gradient with the decoder's projected.

    Args:
        sae: The model, with `topk` or `batchtopk`; its `.grad`s are overwritten.
        spec: `k`, `multi_topk`, `prefixes` and `auxk_coefficient` are read.
        batch: B >= 1 rows.
        dead: int64 [M], ascending.
        k_aux: Most dead latents a row.
        constant: See `losses.reconstruction_loss`.
        backend: `cpu` or `triton`.
    """
    model, wanted = Model.of(sae, spec, backend), wanted_dead(spec, dead, k_aux)
    found = forward(model, spec, batch, wanted, batch.weights.sum() * constant)
    loss, parts, aux = found.loss, found.parts, None
    if wanted is not None and found.dead is not None:
        coefficient = spec.auxk_coefficient
        aux = _auxk(model, wanted, found.dead, found.centred, found.error.neg_(), batch.weights, coefficient)
        loss += coefficient * aux.loss
        parts += [aux.part] if aux.part else []
    mark("decode")
    norm = gradients(model, parts, aux.rows if aux else None, found.centred, found.pulls, batch.x)
    mark("backward")
    finite = aux is None or aux.part is not None or aux.rows is not None
    auxk = aux.loss if aux else None
    return Pass(loss.item(), auxk, finite, norm, found.y_hat, found.values, found.indices)


def wanted_dead(spec: TrainSpec, dead: Tensor, k_aux: int) -> Dead | None:
    """Which codes AuxK wants of the dead latents; null where it is off, or there are none."""
    if not spec.auxk_coefficient or not len(dead):
        return None
    k = min(k_aux, len(dead))
    return Dead(dead, k, dense=len(dead) <= DENSE_AUX * k)


def forward(model: Model, spec: TrainSpec, batch: Rows, wanted: Dead | None, total: Tensor) -> Forward:
    """Codes, reconstruction and its gradient, without AuxK; losses are divided by `total`."""
    ops, sae, W_enc, W_dec = model
    b_enc = sae.b_enc.detach()
    centred = ops.low(batch.x - sae.b_pre.detach())
    batched = sae.parts.activation == "batchtopk"
    times = BATCH_CANDIDATES if batched else 4 if spec.multi_topk else 1
    wide, indices_wide, z_dead = ops.encode(centred, W_enc, b_enc, min(times * sae.k, sae.latents), wanted)
    mark("encode")
    wide.relu_()
    if batched:
        values, indices = _best_of_batch(ops, wide, indices_wide, centred, W_enc, b_enc, sae.k, batch.groups)
    else:
        values, indices = wide[:, : sae.k].contiguous(), indices_wide[:, : sae.k].contiguous()

    scale = batch.weights / total
    parts, y_hat, error, loss = _prefixes(model, batch, values, indices, spec.prefixes, scale, batched)
    pulls = parts[0].grad
    if spec.multi_topk:
        error_wide = sae.add_bias(ops.decode(wide, indices_wide, W_dec), batch.x).detach().sub_(batch.y)
        loss += scale @ squares(error_wide) / 8
        parts.append(EntryPart(wide, indices_wide, error_wide.mul_((scale / 4)[:, None])))
        pulls = pulls + parts[-1].grad
    return Forward(loss, parts, pulls, centred, error, z_dead, y_hat, values, indices)


def _prefixes(
    model: Model,
    batch: Rows,
    values: Tensor,
    indices: Tensor,
    prefixes: tuple[int, ...],
    scale: Tensor,
    padded: bool,
) -> tuple[list[EntryPart], Tensor, Tensor, Tensor]:
    """See `losses.prefix_loss`: parts, reconstruction, its error, loss.

    A latent's code reaches every prefix it lies in, so the gradient of its part is the sum over those: the
    first part's is the gradient of the bias. With one prefix there is one part, and the plain loss.
    """
    ops, sae, _, W_dec = model
    share = (2 / len(prefixes) * scale)[:, None]
    y_hat = error = batch.y
    chosen: list[Tensor | None] = []
    grads: list[Tensor] = []
    loss = scale.new_zeros(())
    first = 0
    for number, size in enumerate(prefixes):
        alone = len(prefixes) == 1
        mask = None if alone and not padded else values > 0
        if mask is not None and not alone:
            mask &= (indices >= first) & (indices < size)
        some = values if alone or mask is None else torch.where(mask, values, 0.0)
        decoded = ops.decode(some, indices, W_dec)
        y_hat = y_hat + decoded if number else sae.add_bias(decoded, batch.x).detach()
        error = y_hat - batch.y
        loss += scale @ squares(error) / len(prefixes)
        grads.append(error * share)
        chosen.append(mask)
        first = size
    for number in reversed(range(len(grads) - 1)):
        grads[number] += grads[number + 1]
    parts = [EntryPart(values, indices, grad, mask) for grad, mask in zip(grads, chosen, strict=True)]
    return parts, y_hat, error, loss


def _best_of_batch(
    ops: StepOps,
    values: Tensor,
    indices: Tensor,
    centred: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    groups: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """The best k a row of each group of rows (see `codes.best_of_groups`), from candidates of each row.

    The k-th best of any part is a lower bound for that of the whole, so a row whose last candidate is not
    taken has no more to give. The others are encoded again, with four times the candidates, until that
    holds: exact, whatever the rows.

    Args:
        ops: The backend.
        values: Candidates [B, w] at least 0, each row descending.
        indices: Their latents [B, w].
        centred: What they are codes of [B, D].
        W_enc: [N, D].
        b_enc: [N].
        k: Kept for each row on average.
        groups: Rows of each group, in order.

    Returns:
        Padded codes.
    """
    while True:
        taken = best_of_groups(values, k, groups)
        full = (taken[:, -1] > 0).nonzero().flatten()
        width = values.shape[1]
        if width == len(W_enc) or not len(full):
            break
        wider = min(4 * width, len(W_enc))
        more = ops.encode(centred[full], W_enc, b_enc, wider, None)
        values = F.pad(values, (0, wider - width)).index_copy_(0, full, more.values.relu_())
        indices = F.pad(indices, (0, wider - width)).index_copy_(0, full, more.indices)
    used = (taken > 0).any(0).nonzero()
    slots = int(used[-1]) + 1 if len(used) else 1
    return taken[:, :slots].contiguous(), indices[:, :slots].contiguous()


def _auxk(
    model: Model,
    dead: Dead,
    z: Tensor | tuple[Tensor, Tensor],
    centred: Tensor,
    e: Tensor,
    weights: Tensor,
    coefficient: float,
) -> _Aux:
    """See `losses.auxk_loss`; `coefficient` is in the gradients, not in the loss."""
    ops, W_dec = model.ops, model.W_dec
    if isinstance(z, Tensor):
        keep_best(z, dead.k)
        W_dead = W_dec[dead.ids]
        loss, grad = _aux_error(ops.mm(z, W_dead), e, weights, coefficient)
        if grad is None:
            return _Aux(loss, None, None)
        dz = zero_where_cut(ops.mm(grad, W_dead.T), z)
        return _Aux(loss, None, DeadRows(dead.ids, ops.mm(z.T, grad), ops.mm(dz.T, centred), dz.sum(0)))
    values, indices = z[0].relu_(), dead.ids[z[1]]
    loss, grad = _aux_error(ops.decode(values, indices, W_dec), e, weights, coefficient)
    return _Aux(loss, None if grad is None else EntryPart(values, indices, grad), None)


def _aux_error(e_hat: Tensor, e: Tensor, weights: Tensor, coefficient: float) -> tuple[float, Tensor | None]:
    """The AuxK term and `coefficient` times its gradient by e_hat; 0 and None where not finite."""
    spread = weights @ squares(e - mean_row(e, weights))
    error = e_hat.sub_(e)
    loss = (weights @ squares(error) / spread).item()
    if not math.isfinite(loss):
        return 0.0, None
    return loss, error.mul_((2 * coefficient / spread * weights)[:, None])


def squares(rows: Tensor) -> Tensor:
    """`rows.square().sum(1)` [B] of rows [B, D]."""
    return torch.linalg.vecdot(rows, rows)


def zero_where_cut(grad: Tensor, values: Tensor) -> Tensor:
    """The gradient through a cut of negatives to 0: 0 where values are not above 0; in place."""
    return torch.ops.aten.threshold_backward.grad_input(grad, values, 0, grad_input=grad)


def keep_best(z: Tensor, k: int) -> None:
    """Cut z [B, M] to the best k of each row that are above 0, in place."""
    for part in z.split(ROW_TILE):
        if k < z.shape[1] and int((part > 0).sum(1, dtype=torch.int32).max()) > k:
            values, at = best(part, k)
            part.zero_().scatter_(1, at, values)
        part.relu_()


def gradients(
    model: Model,
    parts: list[EntryPart],
    dead: DeadRows | None,
    centred: Tensor,
    pulls: Tensor,
    x: Tensor,
    *,
    first: bool = True,
    last: bool = True,
) -> float:
    """Fill every `.grad`, the decoder's projected, and give their joint norm.

    Args:
        model: Its SAE's `.grad`s are filled.
        parts: Codes that a gradient flows through; one or more.
        dead: What is added to the dead latents' gradients.
        centred: The encoder's input [B, D].
        pulls: Gradient of the whole output [B, O].
        x: Normalised rows [B, D].
        first: What `.grad` holds is overwritten; else it is added to.
        last: Nothing comes after this: project and measure. Else 0 is given.
    """
    ops, sae = model.ops, model.sae
    W_enc, b_enc, W_dec, _ = (gradient_buffer(getattr(sae, name)) for name in PARAMETERS)
    sorted_parts: list[_Sorted] = []
    if first:
        b_enc.zero_()
    for part in parts:
        segments = segments_of(part.indices, sae.latents, part.chosen)
        values = part.values.flatten()[segments.order]
        grad = ops.low(part.grad)
        dz = zero_where_cut(ops.dots(grad, part.indices, segments, model.W_dec), values)
        b_enc += grad_bias(dz, segments.latent, sae.latents)
        sorted_parts.append(_Sorted(segments, values, grad, dz))
    if dead is not None:
        b_enc.index_add_(0, dead.ids, dead.b_enc)
    norms = _bias_gradients(sae, b_enc, pulls, x, first=first, last=last)

    blocks = ops.blocks(sae.latents, centred)
    cuts = cuts_of(dead.ids, [0, *(block.stop for block in blocks)]) if dead is not None else []
    for number, block in enumerate(blocks):
        here = [part for part in sorted_parts if part.reaches(block)] or sorted_parts[:1]
        decoder = _sum([ops.sums(part.values, part.segments, part.grad, block) for part in here])
        encoder = _sum([ops.sums(part.dz, part.segments, centred, block) for part in here])
        if dead is not None:
            some = slice(cuts[number], cuts[number + 1])
            decoder.index_add_(0, dead.ids[some] - block.start, dead.W_dec[some])
            encoder.index_add_(0, dead.ids[some] - block.start, dead.W_enc[some])
        if not first:
            decoder += W_dec[block]
            encoder += W_enc[block]
        if last:
            directions = sae.W_dec[block]
            along = torch.linalg.vecdot(decoder, directions)
            decoder.addcmul_(directions, along[:, None], value=-1.0)
            norms += [decoder.norm(), encoder.norm()]
        W_dec[block] = decoder
        W_enc[block] = encoder
    return torch.stack(norms).norm().item() if last else 0.0


def _bias_gradients(
    sae: Sae, b_enc: Tensor, pulls: Tensor, x: Tensor, *, first: bool, last: bool
) -> list[Tensor]:
    """Gradients of what is not a latent's own, and the norms of all but the matrices'.

    `b_enc` is that bias's gradient so far; that of `b_pre` through the encoder follows from the whole.
    """
    out, *others = (gradient_buffer(p) for p in (sae.b_dec, sae.b_pre, sae.W_skip) if p is not None)
    if first:
        for grad in (out, *others):
            grad.zero_()
    out += pulls.sum(0)
    if sae.W_skip is not None:
        gradient_buffer(sae.W_skip).addmm_(pulls.T, x)
    if not last:
        return []
    gradient_buffer(sae.b_pre).sub_(torch.mv(sae.W_enc.detach().T, b_enc))
    return [grad.norm() for grad in (b_enc, out, *others)]


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
