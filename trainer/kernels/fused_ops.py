"""What a GPU's kernels do at once of a step's parts, each of which a CPU does by operations of its own.

A program holds a whole row in its registers, so rows are at most `WIDEST` numbers wide, and in float32. Only
what is done to the rows of a matrix once they are summed goes through wider ones in tiles, twice: a latent of
a cross-layer transcoder has a row for all its targets.

Legend: B rows, D width, N latents, M dead latents, E entries of codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from winnow.trainer.kernels.dispatch import triton_module
from winnow.trainer.kernels.reconstruct import Reconstructed

# with 16 warps 16 numbers of a row per thread: the update holds five such rows, and takes 102 registers
WIDEST = 8192
"""Widest row that a kernel holds at once, of the input or of a target."""
WIDEST_DEAD = 16_384
"""Widest row of dead latents that a program cuts to its best."""
# with 4096 the update of int8 moments spilled on sm_80
WIDE_TILE = 2048
"""Numbers of a wider row that a kernel holds at a time, if it can go through a row twice."""


class Finish(NamedTuple):
    """What is done to the rows of a gradient besides summing them, in this order."""

    add: bool = False
    """Add what the gradient holds already: of earlier entries of the step."""
    more: tuple[Tensor, Tensor] | None = None
    """int32 [N], and float32 [M, D]: add to each latent the row that the first names; none if below 0."""
    directions: Tensor | None = None
    """float32 [N, D], unit rows: take away what is parallel to them."""
    squares: Tensor | None = None
    """float32 [N]: receives the squared norm of each finished row."""


class AdamStep(NamedTuple):
    """Numbers of one of Adam's steps."""

    lr: float
    betas: tuple[float, float]
    eps: float
    number: int
    """From 1."""


class Errors(NamedTuple):
    """Of rows e and what is given for them, with a weight per row."""

    grad: Tensor
    """[B, O]: twice the weight times given - e; 0 where that is not finite."""
    error: Tensor
    """[]: sum of weight |given - e|^2."""
    weight: Tensor
    """[]: sum of the weights."""
    mean: Tensor
    """[O]: weighted mean of e."""
    spread: Tensor
    """[]: sum of weight |e - mean|^2."""


class FusedOps(NamedTuple):
    """See the functions of these names in `reconstruct` and in the modules of Triton kernels."""

    reconstruct: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Reconstructed]
    add_decoded: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    add_sums: Callable[..., None]
    finish_rows: Callable[[Tensor, Tensor | None], Tensor]
    update_rows: Callable[..., None]
    keep_best: Callable[[Tensor, int], None]
    grads_of_codes: Callable[[Tensor, Tensor, Tensor], Tensor]
    errors: Callable[[Tensor, Tensor, Tensor, torch.dtype], Errors]


def fused_ops() -> FusedOps:
    """Those of Triton."""
    sums, dead = triton_module("segment_grad"), triton_module("auxk")
    return FusedOps(
        triton_module("reconstruct").reconstruct,
        triton_module("decode").add_decoded,
        sums.add_sums,
        sums.finish_rows,
        triton_module("update").update_rows,
        dead.keep_best,
        dead.grads_of_codes,
        dead.errors,
    )
