"""Adam's moments of the matrices in half or a quarter of the memory.

They are unpacked, updated and packed again block by block. Packing rounds up or down at random, so that the
mean is kept: a second moment that falls by a thousandth a step would never fall if it were rounded to the
nearest of bfloat16's 256 numbers between two powers of two. The draws follow from the step's number, so a
run resumed draws the same.

- `bfloat16`: both as they are.
- `int8`: a latent's row has one scale (the block of block-wise optimisers, Dettmers et al. 2022,
  arXiv 2110.02861): the first moment in 255 equal steps, of the second its square root in 255, and never 0
  where it is not, since the update divides by it.

Legend: N latents, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from winnow.schemas.training import MomentsDtype

PACKED = ("W_enc", "W_dec")
"""The tensors whose moments are packed; all others are small."""
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
"""Of a packed number; with `int8` each row of each moment has 4 more."""
State = dict[str, Tensor]


class Moments(NamedTuple):
    """Some rows of both moments, in the weights' type, to be changed in place."""

    first: Tensor
    second: Tensor


def new_state(parameter: Tensor, kind: MomentsDtype) -> State:
    """Adam's state before the first step: for `float32` as torch's fused Adam begins it."""
    types = {"float32": (parameter.dtype,) * 2, "bfloat16": (torch.bfloat16,) * 2}
    first, second = types.get(kind, (torch.int8, torch.uint8))
    state = {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, dtype=first),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=second),
    }
    if kind == "int8":
        for name in ("exp_avg_scale", "exp_avg_sq_scale"):
            state[name] = torch.zeros(len(parameter), 1, dtype=torch.float32, device=parameter.device)
    return state


def unpack_moments(state: State, rows: slice, like: Tensor) -> Moments:
    """Rows of both moments: the state's own where they are not packed, else copies."""
    first, second = (state[name][rows] for name in ("exp_avg", "exp_avg_sq"))
    if first.dtype == torch.int8:
        first = first.to(like.dtype).mul_(state["exp_avg_scale"][rows])
        second = second.to(like.dtype).mul_(state["exp_avg_sq_scale"][rows]).square_()
    return Moments(first.to(like.dtype), second.to(like.dtype))


def pack_moments(state: State, rows: slice, moments: Moments, draws: torch.Generator) -> None:
    """Put rows of both back; what `moments` holds is lost. Nothing to do where they are not packed."""
    kind = state["exp_avg"].dtype
    if kind == torch.bfloat16:
        for name, values in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
            state[name][rows] = to_bfloat16(values, draws)
    elif kind == torch.int8:
        first, second = moments.first, moments.second.sqrt_()
        state["exp_avg"][rows] = _to_steps(first, 127, state["exp_avg_scale"][rows], draws)
        steps = _to_steps(second, 255, state["exp_avg_sq_scale"][rows], draws)
        state["exp_avg_sq"][rows] = torch.maximum(steps, (second > 0).to(steps.dtype))


def to_bfloat16(values: Tensor, draws: torch.Generator) -> Tensor:
    """Finite values to one of their two neighbours in bfloat16, such that the mean is kept."""
    bits = values.to(torch.float32).view(torch.int32)
    noise = _noise(values, draws).to(torch.int32).bitwise_and_(0xFFFF)
    return (bits + noise).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)


def _to_steps(values: Tensor, largest: int, scale: Tensor, draws: torch.Generator) -> Tensor:
    """Values [n, D] in whole steps of at most `largest`, whose size [n, 1] is written to `scale`."""
    scale.copy_(values.abs().amax(1, keepdim=True) / largest)
    size = torch.where(scale > 0, scale, 1).to(values.dtype)
    up = _noise(values, draws).to(values.dtype).add_(2**15).div_(2**16)
    return up.add_(values / size).floor_().clamp_(-largest, largest)


def _noise(like: Tensor, draws: torch.Generator) -> Tensor:
    """16 random bits for each number."""
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    words.random_(-(2**63), None, generator=draws)
    return words.view(torch.int16)[: like.numel()].view(like.shape)
