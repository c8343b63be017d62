"""Gradients over the data axis: summed where they are small, or made from everybody's rows and codes.

Legend: P ranks of the data axis, B rows of the fullest rank, D width of the input, O of the output, n latents
of this shard, w entries a row.

Summing dense gradients sends 2 (P-1)/P n (D + O + 1) numbers, however few rows there are. Gathering sends
(P-1) B rows of the encoder's input, of each part's gradient, and w codes: at n = 32,768, D = 768 and
B = 1,024 on 8 ranks a seventh. The arithmetic chooses, anew each step, alike on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from winnow.trainer.kernels.segment_grad import Segments, segments_of
from winnow.trainer.kernels.step_ops import StepOps
from winnow.trainer.mesh.world import Axis, Pending


class Part(NamedTuple):
    """Codes of the rows of one batch that a gradient flows through."""

    values: Tensor
    """[B, w]."""
    dz: Tensor
    """[B, w]: the gradient by the codes."""
    indices: Tensor
    """int64 [B, w]."""
    grad: Tensor
    """[B, O]: of the reconstruction made from these codes."""


def dense_bytes(ranks: int, latents: int, d_in: int, d_out: int, itemsize: int) -> int:
    """What a rank sends to sum the gradients of n latents."""
    return 2 * (ranks - 1) * latents * (d_in + d_out + 1) * itemsize // ranks


def rows_bytes(ranks: int, rows: int, d_in: int, d_out: int, widths: Sequence[int], itemsize: int) -> int:
    """What a rank sends to gather rows and the codes of parts of these widths."""
    numbers = d_in + len(widths) * d_out + 2 * sum(widths)
    return (ranks - 1) * rows * (numbers * itemsize + 4 * sum(widths))


class Gather:
    """Gathers rows and codes over the data axis while the step goes on.

    Args:
        axis: The data axis.
        centred: The encoder's input of this rank's rows [b, D].
        rows: Rows B of the fullest rank; others pad with 0.
    """

    def __init__(self, axis: Axis, centred: Tensor, rows: int) -> None:
        self._axis, self._rows = axis, rows
        self._centred = self._start(centred)
        self._parts: list[tuple[Pending, Pending, Pending]] = []

    def add(self, part: Part) -> None:
        """Begin to gather a part."""
        here = torch.tensor(part.values.shape[1])
        width = int(self._axis.largest(here))
        codes = torch.stack([part.values, part.dz], 1)
        indices = part.indices.to(torch.int32)
        self._parts.append(
            (self._start(_widen(codes, width)), self._start(_widen(indices, width)), self._start(part.grad))
        )

    def result(self) -> tuple[Tensor, list[Part]]:
        """The encoder's input [P * B, D] and the parts, the ranks' rows one after another."""
        parts: list[Part] = []
        for codes, indices, grad in self._parts:
            values, dz = codes.wait().flatten(0, 1).unbind(1)
            ids = indices.wait().flatten(0, 1).to(torch.int64)
            parts.append(Part(values.contiguous(), dz.contiguous(), ids, grad.wait().flatten(0, 1)))
        return self._centred.wait().flatten(0, 1), parts

    def _start(self, tensor: Tensor) -> Pending:
        short = self._rows - len(tensor)
        if short:
            tensor = torch.cat([tensor, tensor.new_zeros(short, *tensor.shape[1:])])
        return self._axis.gather_start(tensor.contiguous())


def _widen(tensor: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1]))


class Gradients(NamedTuple):
    """Where the sums of a step go; `W_dec` [n, O], `W_enc` [n, D], `b_enc` [n]."""

    W_dec: Tensor
    W_enc: Tensor
    b_enc: Tensor


def fill(
    ops: StepOps,
    into: Gradients,
    centred: Tensor,
    parts: list[Part],
    sum_over: Axis | None,
    *,
    first: bool = True,
) -> None:
    """Write the gradients of all parts, summed over `sum_over` where the rows at hand are not all.

    Unless they are the first, they are added to what is there.

    The decoder's sum travels while the encoder's is made.
    """
    latents, centred = len(into.b_enc), ops.low(centred)
    sorted_parts: list[tuple[Segments, Part]] = []
    if first:
        into.b_enc.zero_()
    for part in parts:
        if part.values.numel():
            segments = segments_of(part.indices, latents)
            sorted_parts.append((segments, part._replace(grad=ops.low(part.grad))))
            into.b_enc.index_add_(0, segments.latent, part.dz.flatten()[segments.order])
    travels: list[Pending] = [sum_over.sum_start(into.b_enc)] if sum_over else []
    for name in ("W_dec", "W_enc"):
        target = getattr(into, name)
        for block in ops.blocks(latents, centred):
            total: Tensor | None = None
            for segments, part in sorted_parts:
                weights, rows = (part.values, part.grad) if name == "W_dec" else (part.dz, centred)
                found = ops.sums(weights.flatten()[segments.order], segments, rows, block)
                total = found if total is None else total.add_(found)
            if first:
                target[block] = 0.0 if total is None else total
            elif total is not None:
                target[block] += total
        if sum_over:
            travels.append(sum_over.sum_start(target))
    for travel in travels:
        travel.wait()
