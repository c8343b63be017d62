"""The operations that the fused training step needs from a backend, without their autograd.

Unlike the custom ops, they share one sort between the step's gradients, compute these in blocks of latents,
and compute the dead latents' codes in the same pass over the encoder.

Legend: B rows, D width, N latents, K kept per row, M dead latents, E entries (B*K).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from winnow.schemas.training import ComputeDtype, Float32Products
from winnow.trainer.kernels.best import Best
from winnow.trainer.kernels.decode import decode_cpu
from winnow.trainer.kernels.decode_grad_values import decode_grad_values_cpu
from winnow.trainer.kernels.dispatch import Backend, triton_module
from winnow.trainer.kernels.encode_topk import Wanted, Watch, encode_topk_cpu
from winnow.trainer.kernels.fused_ops import FusedOps, fused_ops
from winnow.trainer.kernels.segment_grad import (
    GPU_BLOCK_BYTES,
    Segments,
    latent_blocks,
    segment_block_cpu,
    segments_of,
    segments_unasked,
)


class Dead(NamedTuple):
    """The dead latents whose codes AuxK needs."""

    ids: Tensor
    """int64 [M], ascending, M >= 1."""
    k: int
    """Latents kept per row, at most M."""
    dense: bool
    """Return pre-activations [B, M]; if False codes (values [B, k], positions in ids [B, k])."""


class Codes(NamedTuple):
    """The best K latents per row, and the dead latents' pre-activations or codes as `Dead` asks."""

    values: Tensor
    indices: Tensor
    dead: Tensor | tuple[Tensor, Tensor] | None


class StepOps(NamedTuple):
    """One backend's operations."""

    encode: Callable[[Tensor, Tensor, Tensor, int, Dead | None], Codes]
    """x [B, D], W_enc [N, D], b [N], K."""
    decode: Callable[[Tensor, Tensor, Tensor], Tensor]
    """values [B, K], indices [B, K], W_dec [N, D] -> [B, D]."""
    dots: Callable[[Tensor, Tensor, Segments, Tensor], Tensor]
    """grad [B, D], indices [B, K], segments, W_dec -> [E], in the segments' order."""
    sums: Callable[[Tensor, Segments, Tensor, slice], Tensor]
    """values [E], segments, rows [B, D], a block of latents -> their sums."""
    blocks: Callable[[int, Tensor], list[slice]]
    """N, rows -> the blocks of latents for `sums`."""
    low: Callable[[Tensor], Tensor]
    """A matrix as the operations above take it: unchanged, or rounded to bfloat16."""
    segments: Callable[[Tensor, int, Tensor | None], Segments]
    """indices [B, K], N, bool [B, K] -> their segments; see `segments_of`."""
    fused: FusedOps | None = None
    """A GPU's kernels that do several of a step's parts at once; None on a CPU."""

    def mm(self, a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The product of two matrices, rounded as `low` does, of type `dtype` (None takes `a`'s)."""
        a_low, b_low = self.low(a), self.low(b)
        return torch.mm(a_low, b_low, out=aligned(len(a), b.shape[1], a_low)).to(dtype or a.dtype)


def aligned(rows: int, columns: int, like: Tensor) -> Tensor:
    """An empty [rows, columns], each row of which starts at a multiple of 64 bytes."""
    # the library's product into other rows took twice the time: [4096, 576] x [576, 1639], 88 ms, not 44
    step = 64 // like.element_size()
    return like.new_empty(rows, -(-columns // step) * step)[:, :columns]


def step_ops(
    backend: Backend, compute_dtype: ComputeDtype = "float32", float32_products: Float32Products = "ieee"
) -> StepOps:
    """The operations of `cpu` or `triton`.

    With `bfloat16` their operands are rounded by `low`; sums and results stay in float32. With `bounded`, a
    GPU encodes float32 rows by products in bfloat16, to the same result up to float noise.
    """
    half = compute_dtype == "bfloat16"
    if backend == "cpu":
        # rounded to bfloat16's numbers but kept in float32: torch's primitives would round the sums too
        low = _rounded if half else _as_it_is
        return StepOps(_encode_cpu, decode_cpu, _dots_cpu, segment_block_cpu, latent_blocks, low, segments_of)
    encode = triton_module("encode_topk").encode_topk
    if float32_products == "bounded":
        encode = triton_module("encode_bounded").encode_topk_bounded
    decode = triton_module("decode").decode
    dots = triton_module("decode_grad_values").decode_grad_values
    sums = triton_module("segment_grad").segment_sums

    def encode_with_dead(x: Tensor, W_enc: Tensor, b: Tensor, k: int, dead: Dead | None) -> Codes:
        wanted = None
        if dead is not None and dead.dense:
            # in the operands' type: of [B, M] no other copy is made
            wanted = Wanted(dead.ids, aligned(len(x), len(dead.ids), x))
        values, indices = encode(x, W_enc, b, k, wanted)
        if dead is None or wanted is not None:
            return Codes(values, indices, None if wanted is None else wanted.z)
        # the sweep keeps too little of each group, so the best of the dead need a product of their own, of
        # compacted rows
        return Codes(values, indices, encode(x, W_enc[dead.ids], b[dead.ids], dead.k))

    return StepOps(
        encode_with_dead,
        lambda values, indices, W: decode(values, indices, W, values.dtype),
        lambda grad, indices, segments, W: dots(grad, indices, W).flatten()[segments.order],
        lambda values, segments, rows, block: sums(values, segments.of(block), rows, values.dtype),
        lambda latents, rows: latent_blocks(latents, rows, GPU_BLOCK_BYTES),
        (lambda tensor: tensor.to(torch.bfloat16)) if half else _as_it_is,
        segments_unasked,
        fused_ops(),
    )


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _rounded(tensor: Tensor) -> Tensor:
    """Round to bfloat16's numbers, keeping the type."""
    return tensor.to(torch.bfloat16).to(tensor.dtype)


def _dots_cpu(grad: Tensor, indices: Tensor, segments: Segments, W_dec: Tensor) -> Tensor:  # noqa: ARG001
    """`decode_grad_values_cpu`, which works in the order of the segments."""
    return decode_grad_values_cpu(grad, segments, W_dec)


def _encode_cpu(x: Tensor, W_enc: Tensor, b: Tensor, k: int, dead: Dead | None) -> Codes:
    """Compute both top-k's in one pass over the encoder."""
    if dead is None:
        return Codes(*encode_topk_cpu(x, W_enc, b, k), None)
    if dead.dense:
        z = aligned(len(x), len(dead.ids), x)

        def keep(rows: slice, columns: slice, part: Tensor) -> None:
            z[rows, columns] = part

        return Codes(*encode_topk_cpu(x, W_enc, b, k, Watch(dead.ids, keep)), z)

    # one running best per tile of rows, because a tile's columns arrive in several calls
    running: dict[int, Best] = {}

    def feed(rows: slice, columns: slice, part: Tensor) -> None:
        running.setdefault(rows.start, Best(dead.k)).feed(part, columns.start)

    values, indices = encode_topk_cpu(x, W_enc, b, k, Watch(dead.ids, feed))
    # unordered codes are enough, because AuxK only sums over them
    found = [running[first].codes() for first in sorted(running)]
    return Codes(values, indices, (torch.cat([v for v, _ in found]), torch.cat([i for _, i in found])))
