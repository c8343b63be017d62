"""From pre-activations to codes: which latents are active, and how gradients pass through the selection.

Legend: B rows, D width of the input, N latents, K active latents per row, S slots of padded codes.

*Codes* are `(values [B, S], indices [B, S])`; a slot of value 0 is an inactive latent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# 256 MiB: with a threshold a row has no fixed number of codes, so no running top-k can bound the memory
DENSE_BYTES = 1 << 28
"""Pre-activations held at once when rows are encoded with a threshold, in bytes."""
Codes = tuple[Tensor, Tensor]


def encode_topk(x: Tensor, W_enc: Tensor, b: Tensor, k: int) -> Codes:
    """`relu((x @ W_enc.T + b).topk(k))`, whose backward is sparse.

    Args:
        x: [B, D].
        W_enc: [N, D].
        b: [N].
        k: Latents kept per row.

    Returns:
        values [B, k] descending, indices int64 [B, k] (non-differentiable).
    """
    return _sparse(x, W_enc, b, lambda z: z.topk(k, dim=1))


def encode_batchtopk(x: Tensor, W_enc: Tensor, b: Tensor, k: int, groups: Sequence[int]) -> Codes:
    """The best k * rows positive pre-activations of each group of rows (Bussmann et al. 2024).

    Args:
        x: [B, D].
        W_enc: [N, D].
        b: [N].
        k: Kept per row on average.
        groups: Rows of each group, in order; their sum is B.

    Returns:
        Padded codes, values [B, S] descending; the backward is sparse.
    """
    return _sparse(x, W_enc, b, lambda z: padded(best_of_groups(z, k, groups)))


def best_of_groups(z: Tensor, k: int, groups: Sequence[int]) -> Tensor:
    """Dense z [B, N] cut to the best `k * rows` positive entries of each group of rows, 0 elsewhere.

    Of equal values at the edge the earlier row's, then the earlier column's are taken.
    """
    kept: list[Tensor] = []
    for part in z.relu().split(list(groups)):
        flat, quota = part.flatten(), k * len(part)
        if 0 < quota < len(flat):
            # only the smallest is wanted, so the order is not computed
            edge = flat.topk(quota, sorted=False).values.min()
            above, ties = flat > edge, flat == edge
            # all above the edge, and of the entries equal to it as many as there is room for, in order
            room = quota - above.sum()
            # not `flat >= edge`, false for NaN, which counts as largest, as in torch, and must reach the loss
            chosen = ~(flat < edge) if bool(ties.sum() <= room) else above | (ties & (ties.cumsum(0) <= room))
            part = torch.where(chosen, flat, 0.0).view_as(part)
        kept.append(part)
    return torch.cat(kept)


def encode_above(x: Tensor, W_enc: Tensor, b: Tensor, threshold: Tensor | float) -> Codes:
    """Every pre-activation above `threshold` (a number, [] or [N], at least 0), as padded codes.

    Never holds more than DENSE_BYTES of [B, N] at once. Differentiable by x and the weights, not by the
    threshold.
    """
    # at least one row, however wide
    rows = max(1, DENSE_BYTES // (W_enc.element_size() * len(W_enc)))
    parts = [
        _sparse(some, W_enc, b, lambda z: padded(torch.where(z > threshold, z, 0.0)))
        for some in x.split(rows)
    ]
    slots = max((values.shape[1] for values, _ in parts), default=1)
    widened = [_widen(codes, slots) for codes in parts]
    if not widened:
        # one slot, as `padded` gives it without rows
        return x.new_zeros(0, 1), torch.zeros(0, 1, dtype=torch.int64, device=x.device)
    return torch.cat([v for v, _ in widened]), torch.cat([i for _, i in widened])


def padded(z: Tensor) -> Codes:
    """Dense codes z [B, N] >= 0 as padded ones: S is the most active latents of any row, at least 1."""
    slots = max(1, int((z > 0).sum(1).max())) if len(z) else 1
    # the active ones, since z is at least 0; the rest of the slots have value 0 and count as empty
    values, indices = z.topk(slots, dim=1)
    return values, indices


def _widen(codes: Codes, slots: int) -> Codes:
    missing = slots - codes[0].shape[1]
    return (F.pad(codes[0], (0, missing)), F.pad(codes[1], (0, missing))) if missing else codes


def _sparse(x: Tensor, W_enc: Tensor, b: Tensor, choose: Callable[[Tensor], Codes]) -> Codes:
    # the dense [B, N] is not saved for the backward: `_CodesAt` has the gradient of the kept codes only
    with torch.no_grad():
        values, indices = choose(torch.addmm(b, x, W_enc.T))
    return _CodesAt.apply(x, W_enc, b, values.relu(), indices), indices  # pyright: ignore[reportReturnType]


class _CodesAt(torch.autograd.Function):
    """The identity on codes, with a sparse gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b: Tensor, values: Tensor, indices: Tensor) -> Tensor:  # noqa: ARG004
        # plain autograd would spend a second dense product on a gradient of which K/N is not 0
        ctx.save_for_backward(x, W_enc, values, indices)
        # autograd does not take an input itself for an output
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, values, indices = ctx.saved_tensors
        wants_x, wants_W, wants_b, *_ = ctx.needs_input_grad
        # the cut of negatives to 0, and empty slots
        dz = torch.where(values > 0, grads[0], 0.0)
        dx = F.embedding_bag(indices, W_enc, per_sample_weights=dz, mode="sum") if wants_x else None
        dW = sum_by_latent(dz, indices, x, len(W_enc)) if wants_W else None
        db = dz.new_zeros(len(W_enc)).index_add_(0, indices.flatten(), dz.flatten()) if wants_b else None
        return dx, dW, db, None, None


def sum_by_latent(values: Tensor, indices: Tensor, rows: Tensor, latents: int) -> Tensor:
    """`scatter(values).T @ rows`: for each latent the sum of `rows` weighted by its values.

    Entries are sorted by latent, and the segment of each is summed in the order of rows.

    Args:
        values: [B, k].
        indices: int64 [B, k].
        rows: [B, D].
        latents: N.

    Returns:
        [N, D].
    """
    flat = indices.flatten()
    # stable, so that the entries of a latent stay in the order of rows: no atomics, the same bits every run
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=latents).cumsum(0)
    starts = F.pad(ends[:-1], (1, 0))
    row = order.div(indices.shape[1], rounding_mode="floor")
    return F.embedding_bag(row, rows, starts, per_sample_weights=values.flatten()[order], mode="sum")


# ---- JumpReLU ------------------------------------------------------------------------------------


def jump_relu(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """`pre * (pre > threshold)`, with a straight-through gradient for the threshold.

    Rajamanoharan et al. 2024 (arXiv 2407.14435), section 4: the derivative by the threshold is
    -threshold/bandwidth inside a window of that width about the threshold, 0 outside.

    Args:
        pre: Pre-activations [B, N].
        threshold: [N], at least 0.
        bandwidth: Width of the window.
    """
    return _JumpReLU.apply(pre, threshold, bandwidth)  # pyright: ignore[reportReturnType]


def step_above(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """`(pre > threshold)` as numbers [B, N], with a straight-through gradient for the threshold.

    The derivative by it is -1/bandwidth inside the window; there is none by `pre` (the same source).
    """
    return _Step.apply(pre, threshold, bandwidth)  # pyright: ignore[reportReturnType]


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(pre > threshold, pre, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold = ctx.saved_tensors
        (grad,) = grads
        # the true derivative is 0 almost everywhere: a window about the threshold stands in for the jump
        near = ((pre - threshold).abs() < ctx.bandwidth / 2).to(grad)
        return grad * (pre > threshold), -(threshold / ctx.bandwidth) * (near * grad).sum(0), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold = ctx.saved_tensors
        (grad,) = grads
        near = ((pre - threshold).abs() < ctx.bandwidth / 2).to(grad)
        return None, -(near * grad).sum(0) / ctx.bandwidth, None
