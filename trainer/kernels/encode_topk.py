"""`encode_topk(x, W_enc, b, k)`: the best k latents of each row, without ever holding [B, N].

Equivalent to `reference.encode_topk`: `(x @ W_enc.T + b).topk(k)`, value descending, then index
ascending, on the accumulator (float32 for half precision, whose own rounding would make ties).

Legend: B rows, D width, N latents, K kept per row, M watched latents.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from winnow.trainer.kernels import reference
from winnow.trainer.kernels.best import Best
from winnow.trainer.kernels.decode import decode
from winnow.trainer.kernels.dispatch import triton_module, unknown
from winnow.trainer.kernels.reference import accumulator
from winnow.trainer.kernels.segment_grad import encode_grad_weight

ROW_TILE = 1024
"""Rows of a tile: the library repacks W_enc for every tile, so few rows make the product expensive."""
COLUMN_TILE = 4096
"""Columns of a tile: with ROW_TILE 16 MiB of float32, about the size of a shared cache."""


class Watch(NamedTuple):
    """Columns that are passed on while their tile is in memory, so that they need no second product."""

    ids: Tensor
    """int64 [M], ascending."""
    sink: Callable[[slice, slice, Tensor], None]
    """Called with a slice of the B rows, a slice of the M columns, and z [rows, columns] of these."""


class Wanted(NamedTuple):
    """Columns of which a GPU writes every number, beside the best of all."""

    ids: Tensor
    """int64 [M], ascending."""
    z: Tensor
    """[B, M], which is filled; consecutive numbers in a row."""


@torch.library.custom_op("winnow::encode_topk", mutates_args=())
def encode_topk(x: Tensor, W_enc: Tensor, b: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    """Compute the best k of `x @ W_enc.T + b` per row.

    Args:
        x: [B, D].
        W_enc: [N, D], of x's type.
        b: [N].
        k: Latents kept per row, at most N.
        backend: See `dispatch`.

    Returns:
        values [B, k] in the accumulator's type, descending, negative ones included; indices int64 [B, k],
        ascending among equal values, not differentiable.
    """
    if backend == "cpu":
        return encode_topk_cpu(x, W_enc, b, k)
    if backend == "triton":
        return triton_module("encode_topk").encode_topk(x, W_enc, b, k)
    if backend == "eager":
        return reference.encode_topk(x, W_enc, b, k)
    raise unknown(backend)


@encode_topk.register_fake
def _(x: Tensor, W_enc: Tensor, b: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    values = x.new_empty(x.shape[0], k, dtype=accumulator(x.dtype))
    return values, torch.empty_like(values, dtype=torch.int64)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, W_enc, _, _, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(True)
    ctx.save_for_backward(x, W_enc, output[1])


def _backward(ctx: Any, grad: Tensor, _indices: Tensor) -> tuple[Tensor | None, ...]:
    x, W_enc, indices = ctx.saved_tensors
    wants_x, wants_W, wants_b, *_ = ctx.needs_input_grad
    # only the kept entries have a gradient, so each of these is a sparse sum; x's only if it is asked for
    grad = grad.to(x.dtype)
    dx = decode(grad, indices, W_enc, ctx.backend) if wants_x else None
    dW = encode_grad_weight(grad, indices, x, len(W_enc), ctx.backend) if wants_W else None
    db = grad_bias(grad, indices, len(W_enc)) if wants_b else None
    return dx, dW, db, None, None


encode_topk.register_autograd(_backward, setup_context=_setup)


def grad_bias(grad: Tensor, indices: Tensor, latents: int) -> Tensor:
    """`scatter(grad).sum(0)`: [N]. Deterministic on the CPU; on a GPU only if torch is told to be."""
    return grad.new_zeros(latents).index_add_(0, indices.flatten(), grad.flatten())


def cuts_of(ids: Tensor, edges: list[int]) -> list[int]:
    """For each edge, the number of ascending ids int64 [M] below it."""
    # all edges in one `tolist`, because on a GPU each is a wait for the device
    return torch.searchsorted(ids, torch.tensor(edges, device=ids.device)).tolist()


def places_of(ids: Tensor, latents: int) -> Tensor:
    """int32 [N]: each latent's place in ids [M]; -1 if it is not in them."""
    places = torch.arange(len(ids), dtype=torch.int32, device=ids.device)
    return torch.full((latents,), -1, dtype=torch.int32, device=ids.device).scatter_(0, ids, places)


@torch.no_grad()
def encode_topk_cpu(
    x: Tensor, W_enc: Tensor, b: Tensor, k: int, watch: Watch | None = None
) -> tuple[Tensor, Tensor]:
    """`encode_topk` in tiles of ROW_TILE x COLUMN_TILE with a running threshold (see `best`)."""
    (count, _), latents, kind = x.shape, len(W_enc), accumulator(x.dtype)
    values = torch.empty(count, k, dtype=kind)
    indices = torch.empty(count, k, dtype=torch.int64)
    # one buffer for all tiles, because a fresh tensor costs its page faults again (docs/kernels.md)
    buffer = torch.empty(min(ROW_TILE, count) * min(COLUMN_TILE, latents), dtype=kind)
    b = b.to(kind)
    starts = range(0, latents, COLUMN_TILE)
    cuts = cuts_of(watch.ids, [*starts, latents]) if watch else []
    for top in range(0, count, ROW_TILE):
        rows = slice(top, min(top + ROW_TILE, count))
        x_tile = x[rows].to(kind)
        running = Best(k)
        for tile, left in enumerate(starts):
            W_tile = W_enc[left : left + COLUMN_TILE].to(kind)
            # the last tile is narrower: a view of its exact shape keeps it contiguous, as `feed` wants it
            z = buffer[: len(x_tile) * len(W_tile)].view(len(x_tile), len(W_tile))
            torch.addmm(b[left : left + COLUMN_TILE], x_tile, W_tile.T, out=z)
            if k:
                running.feed(z, left)
            if watch and cuts[tile] < cuts[tile + 1]:
                columns = slice(cuts[tile], cuts[tile + 1])
                # `index_select` copies, which is needed here: the next tile overwrites z
                watch.sink(rows, columns, z.index_select(1, watch.ids[columns] - left))
        if k:
            values[rows], indices[rows] = running.ordered()
    return values, indices
