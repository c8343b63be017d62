"""Gradients over the data axis: summed if that sends less, or else computed from all ranks' rows and codes.

Legend: P ranks of the data axis, B rows of the fullest rank, D width of the input, O of the output, n latents
of this shard, w entries per row.

Summing dense gradients sends 2 (P-1)/P n (D + O + 1) numbers, however few rows there are. Gathering sends
(P-1) B rows of the encoder's input, of each part's gradient, and w codes: at n = 32,768, D = 768 and
B = 1,024 on 8 ranks a seventh. The arithmetic decides in every step, with the same result on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from winnow.trainer.mesh.world import Axis, Pending


class Part(NamedTuple):
    """Codes of the rows of one batch that a gradient flows through."""

    values: Tensor
    """[B, w]."""
    dz: Tensor
    """[B, w]: the gradient with respect to the codes."""
    indices: Tensor
    """int64 [B, w]."""
    grad: Tensor
    """[B, O]: of the reconstruction made from these codes."""
    whole: bool
    """Whether that is a gradient of the whole output."""


def dense_bytes(ranks: int, latents: int, d_in: int, d_out: int, itemsize: int) -> int:
    """What a rank sends to sum the gradients of n latents."""
    # a ring sends each rank's share of the tensor twice round: to be added up, and to be handed out
    return 2 * (ranks - 1) * latents * (d_in + d_out + 1) * itemsize // ranks


def rows_bytes(ranks: int, rows: int, d_in: int, d_out: int, widths: Sequence[int], itemsize: int) -> int:
    """What a rank sends to gather rows and the codes of parts of these widths."""
    # two numbers per entry, its value and its dz; its index is an int32
    numbers = d_in + len(widths) * d_out + 2 * sum(widths)
    return (ranks - 1) * rows * (numbers * itemsize + 4 * sum(widths))


class Gather:
    """Gathers rows and codes over the data axis while the step continues.

    Args:
        axis: The data axis.
        centred: The encoder's input of this rank's rows [b, D].
        rows: B, of the fullest rank; all others are padded with 0.
    """

    def __init__(self, axis: Axis, centred: Tensor, rows: int) -> None:
        self._axis, self._rows = axis, rows
        self._centred = self._start(centred)
        self._parts: list[tuple[Pending, Pending, Pending, bool]] = []

    def add(self, part: Part) -> None:
        """Start to gather a part."""
        # a shard trims its codes to its fullest row (`mesh.topk.keep`), so widths differ from rank to rank
        here = torch.tensor(part.values.shape[1])
        width = int(self._axis.largest(here))
        codes = torch.stack([part.values, part.dz], 1)
        # half the bytes, and an index of a shard fits
        indices = part.indices.to(torch.int32)
        travels = (
            self._start(tensor) for tensor in (_widen(codes, width), _widen(indices, width), part.grad)
        )
        self._parts.append((*travels, part.whole))  # pyright: ignore[reportArgumentType]

    def result(self) -> tuple[Tensor, list[Part]]:
        """The encoder's input [P * B, D] and the parts, the ranks' rows one after another."""
        parts: list[Part] = []
        for codes, indices, grad, whole in self._parts:
            values, dz = codes.wait().flatten(0, 1).unbind(1)
            ids = indices.wait().flatten(0, 1).to(torch.int64)
            grads = grad.wait().flatten(0, 1)
            # the stack is [B, 2, w]: its halves have gaps
            parts.append(Part(values.contiguous(), dz.contiguous(), ids, grads, whole))
        return self._centred.wait().flatten(0, 1), parts

    def _start(self, tensor: Tensor) -> Pending:
        short = self._rows - len(tensor)
        if short:
            # a gather takes one shape; rows of zeros have codes of value 0, which the segments leave out
            tensor = torch.cat([tensor, tensor.new_zeros(short, *tensor.shape[1:])])
        return self._axis.gather_start(tensor.contiguous())


def _widen(tensor: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1]))
