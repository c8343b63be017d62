"""What the fused training step asks of a backend: the operations below their autograd.

Beside what the custom ops offer, the step shares one sort between its gradients, takes them in blocks
of latents, and takes the dead latents' codes from the same pass over the encoder.

Legend: B rows, D width, N latents, K kept a row, M dead latents, E entries (B*K).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.kernels.best import Best
from trainer.kernels.decode import decode_cpu
from trainer.kernels.decode_grad_values import decode_grad_values_cpu
from trainer.kernels.dispatch import Backend, triton_module
from trainer.kernels.encode_topk import Watch, encode_topk_cpu
from trainer.kernels.segment_grad import Segments, latent_blocks, segment_block_cpu


class Dead(NamedTuple):
    """The dead latents whose codes AuxK wants."""

    ids: Tensor
    """int64 [M], ascending, M >= 1."""
    k: int
    """Kept a row, at most M."""
    dense: bool
    """Whether pre-activations [B, M] are wanted, or codes (values [B, k], positions in ids [B, k])."""


class Codes(NamedTuple):
    """The best K latents a row, and what was asked for of the dead ones."""

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
    """N, rows: the blocks to ask for."""


def step_ops(backend: Backend) -> StepOps:
    """The operations of `cpu` or `triton`."""
    if backend == "cpu":
        return StepOps(encode_cpu, decode_cpu, dots_cpu, segment_block_cpu, latent_blocks)
    encode, decode = triton_module("encode_topk").encode_topk, triton_module("decode").decode
    dots = triton_module("decode_grad_values").decode_grad_values
    sums = triton_module("segment_grad").segment_sums

    def encode_with_dead(x: Tensor, W_enc: Tensor, b: Tensor, k: int, dead: Dead | None) -> Codes:
        values, indices = encode(x, W_enc, b, k)
        if dead is None:
            return Codes(values, indices, None)
        W_dead, b_dead = W_enc[dead.ids], b[dead.ids]  # compacted: the cost falls with their number
        found = torch.addmm(b_dead, x, W_dead.T) if dead.dense else encode(x, W_dead, b_dead, dead.k)
        return Codes(values, indices, found)

    return StepOps(
        encode_with_dead,
        decode,
        lambda grad, indices, segments, W: dots(grad, indices, W).flatten()[segments.order],
        lambda values, segments, rows, _: sums(values, segments, rows),
        lambda latents, _: [slice(0, latents)],
    )


def dots_cpu(grad: Tensor, indices: Tensor, segments: Segments, W_dec: Tensor) -> Tensor:  # noqa: ARG001
    """`decode_grad_values_cpu`, which walks the segments."""
    return decode_grad_values_cpu(grad, segments, W_dec)


def encode_cpu(x: Tensor, W_enc: Tensor, b: Tensor, k: int, dead: Dead | None) -> Codes:
    """One pass over the encoder for both top-k's."""
    if dead is None:
        return Codes(*encode_topk_cpu(x, W_enc, b, k), None)
    if dead.dense:
        z = x.new_empty(len(x), len(dead.ids))

        def keep(rows: slice, columns: slice, part: Tensor) -> None:
            z[rows, columns] = part

        return Codes(*encode_topk_cpu(x, W_enc, b, k, Watch(dead.ids, keep)), z)

    running: dict[int, Best] = {}

    def feed(rows: slice, columns: slice, part: Tensor) -> None:
        running.setdefault(rows.start, Best(dead.k)).feed(part, columns.start)

    values, indices = encode_topk_cpu(x, W_enc, b, k, Watch(dead.ids, feed))
    found = [running[first].codes() for first in sorted(running)]
    return Codes(values, indices, (torch.cat([v for v, _ in found]), torch.cat([i for _, i in found])))
