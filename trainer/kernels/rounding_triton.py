"""How kernels round float32 to fewer bits: to nearest, or up or down at random.

Random bits are a function of a seed and an element's place alone, not of how a kernel divides its work.
"""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from winnow.trainer.kernels.support_triton import interpreted

_INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Float32 `x` as `dtype`, rounded to nearest."""
    # Triton 3.7.1's interpreter cuts the lower bits off for bfloat16, whatever is asked for; a GPU rounds
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def bits_of_row(seed, row, left, D, BLOCK_D: tl.constexpr):
    """32 random bits for each number of a row of D from place `left` on, int32 [BLOCK_D].

    BLOCK_D is a power of two from 4 on, and `left` a multiple of it.
    """
    # one counter serves four numbers, as Philox gives four words for each; D is rounded up, so that no two
    # rows share one
    counter = row * ((D + 3) // 4) + left // 4 + tl.arange(0, BLOCK_D // 4)
    first, second, third, fourth = tl.randint4x(seed, counter)
    words = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(words, [BLOCK_D]).to(tl.int32, bitcast=True)


@triton.jit
def at_random(x, noise):
    """Finite float32 `x` as one of its two neighbours in bfloat16, by 16 random bits; the mean is kept."""
    bits = x.to(tl.int32, bitcast=True) + noise
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
