"""What torch's own operations cost on a GPU: bytes moved, products, kernels launched.

Bytes are those an operation moves if caches keep nothing, each operand once. Top-k, sort and deterministic
scatters make several passes, whose numbers were read in the sources of torch 2.13 for CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from winnow.trainer.kernels.cost import Cost, size_of

VIEWS = frozenset(
    [
        "view",
        "reshape",
        "expand",
        "slice",
        "select",
        "split",
        "t",
        "transpose",
        "unsqueeze",
        "squeeze",
        "detach",
        "alias",
        "as_strided",
        "unbind",
        "permute",
        "device",
        "_unsafe_view",
        "lift_fresh",
        "_reshape_alias",
        "narrow",
        "unsafe_split",
        "split_with_sizes",
        "diagonal",
        "view_as",
    ]
)
"""Operations that move nothing."""
FRESH = frozenset(
    ["empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "empty_permuted"]
)
"""Operations that only allocate."""
_FILLS = frozenset(
    [
        "zeros",
        "ones",
        "full",
        "new_zeros",
        "new_ones",
        "new_full",
        "zeros_like",
        "ones_like",
        "full_like",
        "fill",
        "zero",
        "scalar_tensor",
        "arange",
        "random",
    ]
)
_PRODUCTS = frozenset(["mm", "addmm", "bmm"])
_SCATTERS = frozenset(["index_add", "index_put", "_index_put_impl", "index_copy", "scatter_add"])
_GATHERS = frozenset(["index", "index_select", "gather", "embedding"])
_KERNELS = {"topk": 14, "sort": 10, "cumsum": 3, "bincount": 6, "nonzero": 3} | dict.fromkeys(_SCATTERS, 12)
"""Launches of an operation, unless it is one: counted in torch 2.13's sources, not measured."""
_TOPK_PASSES = 5
"""Reads of its input by `topk` on CUDA: four radix passes of 8 bits, and the gather."""
_KEY = 8
"""Bytes of the position that is sorted with each key."""


class Aten(NamedTuple):
    """One call of an operation."""

    cost: Cost
    launches: int


def aten(name: str, given: Sequence[Tensor], made: Sequence[Tensor]) -> Aten:
    """The account of a call.

    Args:
        name: The operation's, without a trailing underscore.
        given: Its tensors, in order.
        made: Its results, which may be among them.
    """
    wrote = sum(map(size_of, made))
    read = sum({id(tensor): size_of(tensor) for tensor in given}.values())
    flops, gathered = 0.0, 0
    if name in _FILLS:
        moved = wrote
    elif name in ("copy", "_to_copy", "clone", "contiguous"):
        moved = (size_of(given[-1]) if given else 0) + wrote
    elif name == "topk":
        moved = _TOPK_PASSES * size_of(given[0]) + wrote
    elif name == "sort":
        moved = _sort_bytes(given[0])
    elif name in _SCATTERS:
        source = given[-1]
        rows = source.shape[0] if source.dim() else 1
        # deterministic: the places are sorted by 8 passes over key and position, then all is added in order
        moved = rows * 2 * _KEY * 2 * 8 + 2 * size_of(source)
    elif name in _GATHERS:
        # a matrix's rows at places given by indices; single numbers count as streamed
        wide = given[0].dim() > 1 and name != "gather"
        gathered, moved = (wrote, wrote) if wide else (0, 2 * wrote)
        moved += sum(map(size_of, given[1:]))
    elif name == "_fused_adam":
        # weights, gradient and both moments are read, and all but the gradient written
        moved = read + read * 3 // 4
    elif name == "embedding_bag":
        gathered, moved = given[1].numel() * given[0].shape[-1] * given[0].element_size(), wrote
    elif name in _PRODUCTS:
        # the last of the tensors may be where the result is to be written (`out`)
        a, b = [tensor for tensor in given if not any(tensor is result for result in made)][-2:]
        flops, moved = 2.0 * a.numel() * b.shape[-1], size_of(a) + size_of(b) + wrote
    else:
        moved = read + wrote
    return Aten(Cost(flops, int(moved), int(gathered)), _KERNELS.get(name, 1))


def _sort_bytes(keys: Tensor) -> int:
    """Bytes of a radix sort of keys with their positions; rows of a matrix are sorted in two passes."""
    passes = keys.element_size() if keys.dim() == 1 else 2
    return keys.numel() * ((keys.element_size() + _KEY) * 2 * passes + _KEY)
