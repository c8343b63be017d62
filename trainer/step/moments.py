"""Adam's moments of the matrices in half or a quarter of the memory.

They are unpacked, updated and packed again block by block. Packing rounds up or down at random, so that the
mean is kept. The draws follow from the step's number, so a resumed run draws the same.

- `bfloat16`: both as they are.
- `int8`: a latent's row has one scale (the block of block-wise optimisers, Dettmers et al. 2022,
  arXiv 2110.02861): the first moment in 255 equal steps, the square root of the second in 255.

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
"""Of a packed number; with `int8` each row of each moment has 4 bytes more."""
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
        # a tensor in float32, as torch's fused Adam wants it
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, dtype=first),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=second),
    }
    if kind == "int8":
        for name in ("exp_avg_scale", "exp_avg_sq_scale"):
            state[name] = torch.zeros(len(parameter), 1, dtype=torch.float32, device=parameter.device)
    return state


def unpack_moments(state: State, rows: slice, like: Tensor) -> Moments:
    """Rows of both moments: the state's own unless they are packed, else copies."""
    first, second = (state[name][rows] for name in ("exp_avg", "exp_avg_sq"))
    if first.dtype == torch.int8:
        first = first.to(like.dtype).mul_(state["exp_avg_scale"][rows])
        second = second.to(like.dtype).mul_(state["exp_avg_sq_scale"][rows]).square_()
    return Moments(first.to(like.dtype), second.to(like.dtype))


def pack_moments(state: State, rows: slice, moments: Moments, draws: torch.Generator) -> None:
    """Put rows of both back; `moments` is overwritten. Does nothing unless they are packed."""
    kind = state["exp_avg"].dtype
    if kind == torch.bfloat16:
        for name, values in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
            state[name][rows] = to_bfloat16(values, draws)
    elif kind == torch.int8:
        # the root, since the update divides by it: 255 steps then cover twice the range of exponents
        first, second = moments.first, moments.second.sqrt_()
        state["exp_avg"][rows] = _to_steps(first, 127, state["exp_avg_scale"][rows], draws)
        steps = _to_steps(second, 255, state["exp_avg_sq_scale"][rows], draws)
        # never 0 unless it is: the update divides by it
        state["exp_avg_sq"][rows] = torch.maximum(steps, (second > 0).to(steps.dtype))


def to_bfloat16(values: Tensor, draws: torch.Generator) -> Tensor:
    """Round finite values to one of their two neighbours in bfloat16, such that the mean is kept."""
    bits = values.to(torch.float32).view(torch.int32)
    # not to the nearest: a second moment that falls by a thousandth per step, as it does in most steps of a
    # latent, would never change among bfloat16's 128 numbers per power of two
    noise = _noise(values, draws).to(torch.int32).bitwise_and_(0xFFFF)
    return (bits + noise).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)


def _to_steps(values: Tensor, largest: int, scale: Tensor, draws: torch.Generator) -> Tensor:
    """Values [n, D] in whole steps of at most `largest`, whose size [n, 1] is written to `scale`."""
    scale.copy_(values.abs().amax(1, keepdim=True) / largest)
    size = torch.where(scale > 0, scale, 1).to(values.dtype)
    # from signed 16 bits to [0, 1)
    up = _noise(values, draws).to(values.dtype).add_(2**15).div_(2**16)
    return up.add_(values / size).floor_().clamp_(-largest, largest)


def _noise(like: Tensor, draws: torch.Generator) -> Tensor:
    """16 random bits for each number."""
    # one draw of 64 bits serves four numbers
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    words.random_(-(2**63), None, generator=draws)
    return words.view(torch.int16)[: like.numel()].view(like.shape)
