"""Losses, and the one home of the definitions of FVU and L0.

Legend: B rows, D d_model, N latents, M dead latents, K active latents a row.

Every function takes row weights [B]. Rows of weight 0 must not reach a sum even when they hold garbage
(0 * inf is NaN), so `present` drops them first; sums are divided by the sum of weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from winnow.sae.codes import encode_batchtopk, jump_relu, step_above
from winnow.sae.metrics import mean_row, sum_squares
from winnow.sae.model import Sae


def reconstruction_loss(x: Tensor, x_hat: Tensor, weights: Tensor, constant: float) -> Tensor:
    """Squared error a row over `constant`, so that predicting the mean costs about 1."""
    return sum_squares(x - x_hat, weights) / (weights.sum() * constant)


class Rows(NamedTuple):
    """One step's rows of weight above 0, normalised."""

    x: Tensor
    """[B, D]: what is read."""
    y: Tensor
    """[B, O]: what is reconstructed; x itself but for a transcoder."""
    weights: Tensor
    """[B]."""
    groups: tuple[int, ...]
    """Rows of each group that BatchTopK selects in, in order; their sum is B."""


class TrainCodes(NamedTuple):
    """A step's codes while gradients are wanted."""

    values: Tensor
    """[B, S]."""
    indices: Tensor | None
    """[B, S]; null where the values are dense, [B, N]."""
    l0: Tensor | None
    """JumpReLU: active latents [B] of each row, differentiable by the thresholds; null otherwise."""


def train_codes(sae: Sae, rows: Rows, bandwidth: float) -> TrainCodes:
    """The codes that a step is trained on; only BatchTopK's differ from `Sae.select`.

    Args:
        sae: The model.
        rows: What is encoded.
        bandwidth: JumpReLU's; see `winnow.sae.codes.jump_relu`.
    """
    activation = sae.parts.activation
    if activation == "topk":
        return TrainCodes(*sae.select(rows.x), None)
    b = sae.b_enc - sae.W_enc @ sae.b_pre
    if activation == "batchtopk":
        return TrainCodes(*encode_batchtopk(rows.x, sae.W_enc, b, sae.k, rows.groups), None)
    pre = torch.addmm(b, rows.x, sae.W_enc.T).relu()
    if activation == "relu":
        return TrainCodes(pre, None, None)
    l0 = step_above(pre, sae.threshold, bandwidth).sum(1)
    return TrainCodes(jump_relu(pre, sae.threshold, bandwidth), None, l0)


def prefix_loss(
    sae: Sae, rows: Rows, codes: TrainCodes, constant: float, prefixes: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Reconstruction loss, the mean over prefixes of the latents, and the reconstruction by all of them.

    With one prefix, N, it is the plain loss. Matryoshka (Bussmann et al. 2025, arXiv 2503.17547) sums; the
    mean keeps learning rate, clipping and AuxK in scale.
    """
    ids = torch.arange(sae.latents, device=rows.x.device) if codes.indices is None else codes.indices
    losses: list[Tensor] = []
    y_hat = rows.y
    for size in prefixes:
        kept = codes.values if size >= sae.latents else torch.where(ids < size, codes.values, 0.0)
        y_hat = sae.reconstruct(kept, codes.indices, rows.x)
        losses.append(reconstruction_loss(rows.y, y_hat, rows.weights, constant))
    return torch.stack(losses).mean(), y_hat


def sparsity_loss(sae: Sae, codes: TrainCodes, weights: Tensor, constant: float, coefficient: float):
    """What keeps `relu` and `jumprelu` sparse, a scalar; the other activations need nothing.

    `relu`: coefficient * sum |z| a row, over sqrt(constant) so that the scale of the rows cancels. The
    decoder's rows have unit norm, so no latent escapes it by a long direction. `jumprelu`: coefficient *
    (L0/K - 1)^2 with straight-through gradients for the thresholds (Rajamanoharan et al. 2024,
    arXiv 2407.14435).
    """
    if codes.l0 is not None:
        return coefficient * ((weights @ codes.l0) / weights.sum() / sae.k - 1).square()
    return coefficient * (weights @ codes.values.sum(1)) / (weights.sum() * constant**0.5)


def multi_topk_loss(
    sae: Sae, rows: Rows, values: Tensor, indices: Tensor, constant: float
) -> tuple[Tensor, Tensor]:
    """L(K) + L(4K)/8 (Gao et al., section A.4) and the reconstruction at K.

    Args:
        sae: The model.
        rows: What is encoded.
        values: The best min(4K, N) values of each row [B, 4K], descending.
        indices: Their latents [B, 4K].
        constant: See `reconstruction_loss`.
    """
    y_hat = sae.reconstruct(values[:, : sae.k], indices[:, : sae.k], rows.x)
    wide = reconstruction_loss(rows.y, sae.reconstruct(values, indices, rows.x), rows.weights, constant)
    return reconstruction_loss(rows.y, y_hat, rows.weights, constant) + wide / 8, y_hat


class AuxK(NamedTuple):
    """The AuxK term of one step."""

    loss: Tensor
    """Scalar, 0 where it was not finite."""
    finite: bool


def auxk_loss(sae: Sae, x: Tensor, error: Tensor, weights: Tensor, dead: Tensor, k_aux: int) -> AuxK:
    """What dead latents could still explain (Gao et al., section A.2).

    With e = x - x_hat *detached*, the min(k_aux, M) best dead latents of each row give
    ``e_hat = W_dec^T relu(z_dead)``, without b_pre; the term is
    ``sum |e - e_hat|^2 / sum |e - mean(e)|^2``, weighted. Only the M dead rows of the weights are
    touched, so the cost falls with their number.

    Args:
        sae: The model.
        x: Normalised rows [B, D].
        error: y - y_hat [B, O]; detached here.
        weights: [B].
        dead: Indices int64 [M] of the dead latents, M >= 1.
        k_aux: Most latents a row.
    """
    e = error.detach()
    W_enc = sae.W_enc[dead]
    z = torch.addmm(sae.b_enc[dead] - W_enc @ sae.b_pre, x, W_enc.T).relu()
    if k_aux < len(dead):
        best, at = z.topk(k_aux, dim=1)
        z = torch.zeros_like(z).scatter(1, at, best)
    e_hat = z @ sae.W_dec[dead]
    spread = sum_squares(e - mean_row(e, weights), weights)
    loss = sum_squares(e - e_hat, weights) / spread
    finite = bool(loss.isfinite())
    return AuxK(loss if finite else torch.zeros_like(spread), finite)
