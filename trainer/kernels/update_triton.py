"""The update of a matrix on a GPU: one pass clips, takes Adam's step, renormalises, averages and rounds.

The numbers of `winnow.trainer.step.update`, which is the specification, up to float32's rounding. Packed
moments are rounded by other random bits of the same law, which follow from the step and a number's place.

Legend: N latents, D width.
"""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.trainer.kernels.cost import Cost, cost_of
from winnow.trainer.kernels.examples import Shape, example
from winnow.trainer.kernels.fused_ops import WIDE_TILE, WIDEST, AdamStep
from winnow.trainer.kernels.rounding_triton import at_random, bits_of_row, narrow
from winnow.trainer.kernels.support_triton import launch, power_of_two

_SCALES = ("exp_avg_scale", "exp_avg_sq_scale")
"""What Adam's state has beside moments of one byte."""


@triton.jit
def _moved(
    weights, grad, first, second, was1, was2, place, inside, joint, largest, step_size, root, eps,
    beta1, share1, beta2, share2, PACKED: tl.constexpr,
):  # fmt: skip
    """Weights and moments after Adam's step, before anything is done to whole rows."""
    g = tl.load(grad + place, mask=inside, other=0.0)
    # in two steps: 1 unless it is clipped, so that the gradient then keeps its bits
    g *= tl.where(joint > largest, largest / joint, 1.0)
    m = tl.load(first + place, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(second + place, mask=inside, other=0.0).to(tl.float32)
    if PACKED:
        m *= was1
        v *= was2
        v *= v
    m = beta1 * m + share1 * g
    v = beta2 * v + share2 * g * g
    w = tl.load(weights + place, mask=inside, other=0.0)
    w -= step_size * m / (tl.sqrt(v) * root + eps)
    return w, m, v


@triton.jit
def _stored(
    w, m, v, scale1, scale2, weights, first, second, average, low, ema_share, seed, row, left, place, inside,
    D, PACKED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write weights, average and moments."""
    tl.store(weights + place, w, mask=inside)
    if low is not None:
        tl.store(low + place, narrow(w, low.dtype.element_ty), mask=inside)
    if average is not None:
        mean = tl.load(average + place, mask=inside, other=0.0)
        tl.store(average + place, mean + ema_share * (w - mean), mask=inside)
    if PACKED:
        noise = bits_of_row(seed, row, left, D, BLOCK_D)
        up = (noise & 0xFFFF).to(tl.float32) / 65536
        steps = tl.floor(up + m / tl.where(scale1 > 0, scale1, 1.0))
        steps = tl.minimum(tl.maximum(steps, -127), 127)
        tl.store(first + place, steps.to(tl.int8), mask=inside)
        up = ((noise >> 16) & 0xFFFF).to(tl.float32) / 65536
        v = tl.sqrt(v)
        steps = tl.minimum(tl.floor(up + v / tl.where(scale2 > 0, scale2, 1.0)), 255)
        # never 0 unless it is: the update divides by it
        steps = tl.maximum(steps, tl.where(v > 0, 1.0, 0.0))
        tl.store(second + place, steps.to(tl.uint8), mask=inside)
    elif first.dtype.element_ty == tl.bfloat16:
        noise = bits_of_row(seed, row, left, D, BLOCK_D)
        tl.store(first + place, at_random(m, noise & 0xFFFF), mask=inside)
        tl.store(second + place, at_random(v, (noise >> 16) & 0xFFFF), mask=inside)
    else:
        tl.store(first + place, m, mask=inside)
        tl.store(second + place, v, mask=inside)


# the seed differs in every step
@triton.jit(do_not_specialize=["seed"])
def _update(
    weights,
    grad,
    first,
    second,
    first_scale,
    second_scale,
    average,
    low,
    loss,
    norm,
    largest,
    step_size,
    root,
    eps,
    beta1,
    share1,
    beta2,
    share2,
    ema_share,
    seed,
    D,
    UNIT: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    joint = tl.load(norm).to(tl.float32)
    # what is not finite leaves everything as it was: the host learns of it later, and stops the run
    if (tl.abs(tl.load(loss)) < float("inf")) & (tl.abs(joint) < float("inf")):
        was1 = 1.0
        was2 = 1.0
        if PACKED:
            was1 = tl.load(first_scale + row)
            was2 = tl.load(second_scale + row)
        if WIDE:
            # twice: what belongs to a whole row (norm, scales), then the same again, written
            square = tl.zeros([BLOCK_D], dtype=tl.float32)
            top1 = tl.zeros([BLOCK_D], dtype=tl.float32)
            top2 = tl.zeros([BLOCK_D], dtype=tl.float32)
            if UNIT or PACKED:
                for left in range(0, D, BLOCK_D):
                    d = left + tl.arange(0, BLOCK_D)
                    w, m, v = _moved(
                        weights, grad, first, second, was1, was2, row * D + d, d < D, joint, largest,
                        step_size, root, eps, beta1, share1, beta2, share2, PACKED,
                    )  # fmt: skip
                    square += w * w
                    top1 = tl.maximum(top1, tl.abs(m))
                    top2 = tl.maximum(top2, v)
            length = tl.maximum(tl.sqrt(tl.sum(square, axis=0)), 1e-12)
            scale1 = tl.max(top1, axis=0) / 127
            scale2 = tl.sqrt(tl.max(top2, axis=0)) / 255
            for left in range(0, D, BLOCK_D):
                d = left + tl.arange(0, BLOCK_D)
                w, m, v = _moved(
                    weights, grad, first, second, was1, was2, row * D + d, d < D, joint, largest, step_size,
                    root, eps, beta1, share1, beta2, share2, PACKED,
                )  # fmt: skip
                if UNIT:
                    w /= length
                _stored(
                    w, m, v, scale1, scale2, weights, first, second, average, low, ema_share, seed, row, left,
                    row * D + d, d < D, D, PACKED, BLOCK_D,
                )  # fmt: skip
        else:
            d = tl.arange(0, BLOCK_D)
            w, m, v = _moved(
                weights, grad, first, second, was1, was2, row * D + d, d < D, joint, largest, step_size,
                root, eps, beta1, share1, beta2, share2, PACKED,
            )  # fmt: skip
            if UNIT:
                w /= tl.maximum(tl.sqrt(tl.sum(w * w, axis=0)), 1e-12)
            scale1 = 1.0
            scale2 = 1.0
            if PACKED:
                scale1 = tl.max(tl.abs(m), axis=0) / 127
                scale2 = tl.sqrt(tl.max(v, axis=0)) / 255
            _stored(
                w, m, v, scale1, scale2, weights, first, second, average, low, ema_share, seed, row, 0,
                row * D + d, d < D, D, PACKED, BLOCK_D,
            )  # fmt: skip
        if PACKED:
            tl.store(first_scale + row, scale1)
            tl.store(second_scale + row, scale2)


@cost_of("_update")
def _(given: Mapping[str, Any]) -> Cost:
    changed = ("weights", "first", "second", "first_scale", "second_scale", "average")
    read_and_written = sum(given[name].nbytes for name in changed if given[name] is not None)
    low = 0 if given["low"] is None else given["low"].nbytes
    again = 0
    if given["WIDE"] and (given["UNIT"] or given["first_scale"] is not None):
        # as if the second time did not hit the caches
        again = sum(given[name].nbytes for name in ("weights", "grad", "first", "second"))
    return Cost(streamed=2 * read_and_written + given["grad"].nbytes + low + again)


def update_rows(
    weights: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    adam: AdamStep,
    loss: Tensor,
    norm: Tensor,
    *,
    largest: float | None,
    unit: bool,
    average: tuple[Tensor, float] | None,
    low: Tensor | None,
    seed: int,
) -> None:
    """Take a step on a matrix, unless loss or norm is not finite.

    Args:
        weights: float32 [N, D], changed in place.
        grad: [N, D].
        state: Adam's, in a form of `winnow.trainer.step.moments`; its moments are changed, its step is not.
        adam: Of this step.
        loss: [], on the device.
        norm: Joint norm of all gradients [], on the device.
        largest: Norm to clip to; None never clips.
        unit: Scale the rows to norm 1 afterwards.
        average: The moving average [N, D], changed in place, and the share of the new weights in it.
        low: [N, D]: receives the new weights, rounded.
        seed: Of the bits that round packed moments, another one for every step and matrix.
    """
    if not weights.numel():
        return
    width, (beta1, beta2) = weights.shape[1], adam.betas
    wide = width > WIDEST
    block = WIDE_TILE if wide else max(16, power_of_two(width))
    mean, share = average or (None, 0.0)
    launch(
        _update,
        (len(weights),),
        weights,
        grad.contiguous(),
        state["exp_avg"],
        state["exp_avg_sq"],
        *(state.get(name) for name in _SCALES),
        mean,
        low,
        loss,
        norm,
        float("inf") if largest is None else largest,
        # here, in double precision: 1 - beta**t loses most of its digits in float32 while t is small
        adam.lr / (1 - beta1**adam.number),
        (1 - beta2**adam.number) ** -0.5,
        adam.eps,
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        share,
        seed,
        width,
        UNIT=unit,
        PACKED=_SCALES[0] in state,
        WIDE=wide,
        BLOCK_D=block,
        num_warps=min(16, max(4, block // 128)),
    )


@example
def _example(shape: Shape) -> None:
    for width in (12 * shape.width, shape.width):
        _example_of(shape, width)


def _example_of(shape: Shape, width: int) -> None:
    def matrix(dtype: torch.dtype = torch.float32) -> Tensor:
        return shape.empty(shape.latents, width, dtype=dtype)

    scales = {name: shape.empty(shape.latents, dtype=torch.float32) for name in _SCALES}
    number = shape.empty(dtype=torch.float32)
    adam = AdamStep(1e-4, (0.9, 0.999), 1e-8, 2)
    for first, second, more in (
        (torch.float32, torch.float32, {}),
        (torch.bfloat16, torch.bfloat16, {}),
        (torch.int8, torch.uint8, scales),
    ):
        state = {"exp_avg": matrix(first), "exp_avg_sq": matrix(second), **more}
        low = None if shape.dtype == torch.float32 else matrix(shape.dtype)
        update_rows(
            matrix(), matrix(), state, adam, number, number,
            largest=1.0, unit=True, average=(matrix(), 0.001), low=low, seed=3,
        )  # fmt: skip
