"""The specification: a step under dense autograd, readable, that the sparse route is held to.

It knows the mesh by its collectives alone, which do nothing if an axis has one rank: each rank encodes the
latents of its shard, `Axis.joined` sums the shards' outputs, and gradients are summed over `data` at the end.
ReLU and JumpReLU, whose codes are dense by nature, have no other route.

Legend: B rows of this rank, D width of the input, O width of the output, N latents, n latents of this shard,
M dead latents of this shard, K active latents per row, S slots of codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from winnow.sae.activations import DenseCodes, activation_of
from winnow.sae.codes import encode_batchtopk, encode_topk
from winnow.sae.metrics import sum_squares
from winnow.trainer.mesh.topk import count_kept
from winnow.trainer.step.context import Ending, Outcome, StepContext, Taken
from winnow.trainer.step.losses import Rows, reconstruction_loss
from winnow.trainer.step.optim import project_decoder_gradient
from winnow.trainer.step.selection import groups_of
from winnow.trainer.step.spans import mark


class TrainCodes(NamedTuple):
    """A step's codes while gradients are wanted."""

    values: Tensor
    """[B, S]."""
    indices: Tensor | None
    """[B, S]; None if the values are dense, [B, n]."""
    dense: DenseCodes | None = None
    """The codes of an activation that selects nothing."""


class AuxK(NamedTuple):
    """The AuxK term of one step."""

    loss: Tensor
    """Scalar, of this rank's rows; 0 if the whole was not finite."""
    value: float
    """Of all rows."""
    finite: bool


def begin(ctx: StepContext, pieces: int) -> SpecStep:
    """Open a step, which takes the whole batch at once: AuxK needs the spread of all its rows."""
    assert pieces == 1, "a spec that asks for more is refused"
    return SpecStep(ctx)


class SpecStep:
    """A step that is under way; see `begin`."""

    def __init__(self, ctx: StepContext) -> None:
        self._ctx = ctx
        self._outcome: Outcome | None = None

    def take(self, batch: Rows) -> Taken:
        """Loss and gradients of the whole batch: this rank's rows; B may be 0 on a mesh."""
        ctx, shared = self._ctx, 0.0
        # once, so that its gradient is summed once
        b_pre = ctx.world.latent.common(ctx.sae.b_pre)
        if ctx.spec.multi_topk:
            loss, y_hat, codes = multi_topk_loss(ctx, batch, b_pre)
        else:
            codes = train_codes(ctx, batch, b_pre)
            loss, y_hat = prefix_loss(ctx, batch, codes)
            if ctx.sparsity and codes.dense is not None:
                term, joint = sparsity_loss(ctx, codes.dense, batch.weights)
                # a joint term is already that of all rows: `whole_loss` must not add it once per rank
                shared = term.item() if joint else 0.0
                loss = loss + term
        auxk, finite = None, True
        if ctx.k_dead:
            aux = auxk_loss(ctx, batch.x, batch.y - y_hat, batch.weights, b_pre)
            loss, auxk, finite = loss + ctx.spec.auxk_coefficient * aux.loss, aux.value, aux.finite
        mark("forward")
        ctx.sae.zero_grad()
        loss.backward()
        self._outcome = Outcome(whole_loss(ctx, loss.detach(), shared), auxk, finite, joint_gradients(ctx))
        mark("backward")
        indices = codes.indices
        if indices is None:
            # dead counts and telemetry want an index beside every value
            indices = torch.arange(ctx.sae.latents, device=loss.device).expand_as(codes.values)
        return Taken(y_hat.detach(), codes.values.detach(), indices)

    def end(self) -> Ending:
        """What the step found; its gradients are in `.grad`."""
        assert self._outcome is not None, "nothing was taken"
        return Ending.known(self._outcome)


# ---- codes -----------------------------------------------------------------------------------------


def train_codes(ctx: StepContext, rows: Rows, b_pre: Tensor) -> TrainCodes:
    """The codes that a step is trained on; only BatchTopK's differ from `Sae.select`.

    Args:
        ctx: The step's.
        rows: What is encoded.
        b_pre: The encoder's, see `SpecStep.take`.
    """
    sae, selects = ctx.sae, ctx.sae.parts.traits.selects
    # folded into the bias, so that autograd keeps no second copy of the rows
    b = sae.b_enc - sae.W_enc @ b_pre
    if selects == "row":
        values, indices = encode_topk(rows.x, sae.W_enc, b, min(ctx.k, sae.latents))
        return TrainCodes(*ctx.shard.cut(values, indices, ctx.k))
    if selects == "batch" and ctx.world.size == 1:
        return TrainCodes(*encode_batchtopk(rows.x, sae.W_enc, b, ctx.k, rows.groups))
    # dense: on a mesh BatchTopK cannot know beforehand how many of a row are selected
    pre = torch.addmm(b, rows.x, sae.W_enc.T).relu()
    if selects == "batch":
        return TrainCodes(best_of_all(ctx, ctx.k, rows, pre), None)
    dense = activation_of(sae.parts.activation).codes(sae, pre, ctx.spec.bandwidth)
    return TrainCodes(dense.values, None, dense)


def best_of_all(ctx: StepContext, k: int, rows: Rows, z: Tensor) -> Tensor:
    """Dense codes z [B, n] cut to the best k per row of each group of rows over all ranks."""
    groups = groups_of(rows.groups, k, ctx.groups, ctx.world, z.device)
    # stable, so that of equal values the lower latent comes first, as in one process
    values, at = z.detach().sort(dim=1, descending=True, stable=True)
    slot = torch.arange(values.shape[1], device=z.device)
    return z * torch.zeros_like(values).scatter(1, at, (slot < groups.taken(values)[:, None]).to(z))


# ---- terms of the loss, of this rank's rows --------------------------------------------------------


def prefix_loss(ctx: StepContext, rows: Rows, codes: TrainCodes) -> tuple[Tensor, Tensor]:
    """Reconstruction loss, the mean over prefixes of the latents, and the reconstruction by all of them.

    With one prefix, N, it is the plain loss; more are Matryoshka's (Bussmann et al. 2025, arXiv 2503.17547).
    """
    own, device = ctx.shard.part, rows.x.device
    ids = torch.arange(len(own), device=device) if codes.indices is None else codes.indices
    losses: list[Tensor] = []
    y_hat = rows.y
    for size in ctx.spec.prefixes:
        # how many of this shard's latents the prefix contains; below 0 if it ends before them, and then the
        # shard still takes part in the sum
        held = size - own.start
        kept = codes.values if held >= len(own) else torch.where(ids < held, codes.values, 0.0)
        y_hat = ctx.shard.reconstruct(kept, codes.indices, rows.x)
        losses.append(reconstruction_loss(rows.y, y_hat, rows.weights, ctx.constant, ctx.total))
    # the paper sums; the mean keeps the scale of learning rate, clipping and AuxK
    return torch.stack(losses).mean(), y_hat


def sparsity_loss(ctx: StepContext, codes: DenseCodes, weights: Tensor) -> tuple[Tensor, bool]:
    """The sparsity term of dense codes, a scalar, and whether it is of all ranks' rows; see `Activation`."""
    activation = activation_of(ctx.sae.parts.activation)
    counted = ctx.world.latent.joined(weights @ activation.counted(codes))
    if activation.joint:
        # not linear in the rows: a sum of the ranks' terms would be another term
        counted = ctx.world.data.joined(counted)
    term = activation.sparsity(counted, ctx.total, ctx.k, ctx.constant, ctx.sparsity)
    return term, activation.joint


def multi_topk_loss(ctx: StepContext, rows: Rows, b_pre: Tensor) -> tuple[Tensor, Tensor, TrainCodes]:
    """L(K) + L(4K)/8 (Gao et al., section A.4), the reconstruction at K, and the codes at K."""
    sae, shard, wide = ctx.sae, ctx.shard, min(4 * ctx.k, ctx.spec.latents)
    best, ids = encode_topk(rows.x, sae.W_enc, sae.b_enc - sae.W_enc @ b_pre, min(wide, sae.latents))
    # one encoding for both: the best K are the first of the best 4K
    codes = shard.cut(best[:, : ctx.k], ids[:, : ctx.k], ctx.k)
    y_hat = shard.reconstruct(*codes, rows.x)
    y_wide = shard.reconstruct(*shard.cut(best, ids, wide), rows.x)
    loss_wide = reconstruction_loss(rows.y, y_wide, rows.weights, ctx.constant, ctx.total)
    loss = reconstruction_loss(rows.y, y_hat, rows.weights, ctx.constant, ctx.total) + loss_wide / 8
    return loss, y_hat, TrainCodes(*codes)


def auxk_loss(ctx: StepContext, x: Tensor, error: Tensor, weights: Tensor, b_pre: Tensor) -> AuxK:
    """What dead latents could still explain (Gao et al., section A.2).

    With e = x - x_hat *detached*, the min(k_aux, M) best dead latents of each row give
    ``e_hat = W_dec^T relu(z_dead)``, without b_pre; the term is
    ``sum |e - e_hat|^2 / sum |e - mean(e)|^2``, weighted. Only the M dead rows of the weights are
    touched, so the cost falls with their number.

    Args:
        ctx: Its dead latents, of all shards one or more.
        x: Normalised rows [B, D].
        error: y - y_hat [B, O]; detached here.
        weights: [B].
        b_pre: The encoder's, see `SpecStep.take`.
    """
    sae, data, e = ctx.sae, ctx.world.data, error.detach()
    e_hat = ctx.world.latent.joined(dead_codes(ctx, x, b_pre) @ sae.W_dec[ctx.dead])
    # all three sums over ranks before the division: a mean of ranks' ratios would be another term
    mean = data.sum(weights @ e) / ctx.total
    left, spread = sum_squares(e - e_hat, weights), sum_squares(e - mean, weights)
    sums = data.sum(torch.stack([left.detach(), spread]))
    loss, value = left / sums[1], (sums[0] / sums[1]).item()
    # false for NaN, too. A zero of its own, since 0 * NaN would carry the NaN into every gradient
    finite = -float("inf") < value < float("inf")
    return AuxK(loss, value, True) if finite else AuxK(torch.zeros_like(spread), 0.0, False)


def dead_codes(ctx: StepContext, x: Tensor, b_pre: Tensor) -> Tensor:
    """[B, M]: the k_aux best dead latents of each row over all shards, at least 0; 0 elsewhere."""
    sae, dead, latent = ctx.sae, ctx.dead, ctx.world.latent
    W_enc = sae.W_enc[dead]
    z = torch.addmm(sae.b_enc[dead] - W_enc @ b_pre, x, W_enc.T).relu()
    # all are kept, so nothing needs to be selected, and no other shard asked
    if ctx.k_aux >= sum(ctx.dead_of_shards):
        return z
    if latent.size == 1:
        best, at = z.topk(ctx.k_aux, dim=1)
        return torch.zeros_like(z).scatter(1, at, best)
    available = [min(ctx.k_aux, count) for count in ctx.dead_of_shards]
    best, at = z.detach().sort(dim=1, descending=True, stable=True)
    kept = count_kept(best[:, : available[latent.rank]], ctx.k_aux, available, latent).kept
    slot = torch.arange(len(dead), device=x.device) < kept[:, None]
    return z * torch.zeros_like(z).scatter(1, at, slot.to(z))


# ---- sums over the mesh ----------------------------------------------------------------------------


def whole_loss(ctx: StepContext, loss: Tensor, shared: float) -> float:
    """The loss of all ranks' rows, of which `shared` is already that of all rows."""
    data = ctx.world.data
    return loss.item() if data.size == 1 else (data.sum(loss.double() - shared) + shared).item()


@torch.no_grad()
def joint_gradients(ctx: StepContext) -> float:
    """Sum the gradients over `data`, project the decoder's, and give the norm over all shards.

    Thresholds are left out of the norm: the scale of their gradient is the bandwidth's.
    """
    sae, world = ctx.sae, ctx.world
    named = {name: getattr(sae, name) for name in sae.parameter_names}
    travels = [world.data.sum_start(p.grad) for p in named.values() if world.data.size > 1]
    for travel in travels:
        travel.wait()
    # after the sum, so that the norm is of the projected gradient of the whole batch
    project_decoder_gradient(sae)
    measured = {name: p.grad for name, p in named.items() if name != "threshold" and p.grad is not None}
    if world.latent.size == 1:
        return torch.nn.utils.get_total_norm(list(measured.values())).item()
    squared = {name: grad.double().square().sum() for name, grad in measured.items()}
    # split over the shards; all others are replicated and counted once
    own = torch.stack([squared.pop(name) for name in ("W_enc", "b_enc", "W_dec")]).sum()
    return (world.latent.sum(own) + torch.stack([*squared.values()]).sum()).sqrt().item()
