"""What the device says in a usual step, where the code of the step asks it for a number.

A usual step has no ties, no row that is done again, no row of weight 0, entries in every block of latents,
and a gradient that is clipped. Small facts travel with the tensors that they follow from (`note`): how many
rows a mask of all rows has, numbers that the host sent. The others are known by the function that asks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from winnow.trainer.mesh.topk import candidates

_KNOWN = 4096
"""Most numbers of a tensor of the host that are remembered when it is sent."""
_KEEPING = ("_to_copy", "view", "reshape", "unsqueeze", "squeeze", "max", "amax", "clone", "detach", "alias")
"""Operations on a tensor whose numbers stay the same, or whose largest does."""
Number = float | int | bool


class Answers:
    """For one step.

    Args:
        dead: Dead latents M of this shard.
        k: Latents kept per row of all shards.
        shards: Shards S.
        batched: Whether rows are selected together.
        clip_norm: The largest norm of a gradient that is not clipped; None never clips.
    """

    def __init__(self, *, dead: int, k: int, shards: int, batched: bool, clip_norm: float | None) -> None:
        self._dead, self._k, self._shards, self._batched = dead, k, shards, batched
        self._norm = max(1.0, 2 * (clip_norm or 1.0))
        self._named: dict[str, Callable[[Tensor, FrameType], Number | Sequence[Number] | None]] = {
            "micro_batches": lambda *_: True,
            "_wanted": lambda *_: True,
            "reaches": lambda *_: True,
            "best_of_groups": lambda *_: True,
            "cuts_of": self._cuts,
            "keep": self._width,
            # loss, norm and AuxK's term (`Ending`), then the number of dead latents
            "read": lambda asked, _: [self._norm] * 3 + [self._dead] * (asked.numel() - 3),
        }

    # ---- numbers ---------------------------------------------------------------------------------

    def numbers(self, asked: Tensor, frame: FrameType | None) -> list[Number] | None:
        """The numbers of a tensor that the host reads, flat; None if none are known."""
        answer = self._named.get(_function(frame))
        said = answer(asked, frame) if answer is not None and frame is not None else None
        if said is None:
            said = getattr(asked, "_usual", None)
        if said is None and asked.is_floating_point():
            said = self._norm
        if said is None:
            return None
        numbers = list(said) if isinstance(said, Sequence) else [said] * asked.numel()
        # what has no fact of its own inside a list of facts is a plain number
        return [self._norm if number is None else number for number in numbers]

    def note(self, name: str, given: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        """Attach what is known of an operation's results."""
        if len(made) < 1:
            return
        fact: Any = None
        first = given[0] if given else None
        if name == "any":
            fact = False
        elif name == "all":
            fact = True
        elif name == "sum" and first is not None and first.dtype == torch.bool:
            # a mask of all: of what is asked about rows, all are there
            fact = first.numel() // max(1, made[0].numel())
        elif name == "_to_copy" and first is not None and first.device.type == "cpu":
            fact = _sent(first)
        elif name in _KEEPING and first is not None:
            fact = getattr(first, "_usual", None)
        elif name in ("stack", "cat") and made[0].numel() <= _KNOWN:
            fact = [number for tensor in given for number in _facts(tensor)]
            fact = fact if any(number is not None for number in fact) else None
        if fact is not None:
            made[0]._usual = fact  # pyright: ignore[reportAttributeAccessIssue]

    def _cuts(self, asked: Tensor, _frame: FrameType) -> list[int]:
        # ascending ids, spread evenly
        last = max(1, asked.numel() - 1)
        return [self._dead * number // last for number in range(asked.numel())]

    def _width(self, _asked: Tensor, frame: FrameType) -> int:
        """Codes of the fullest row."""
        columns = frame.f_locals["values"].shape[1]
        if self._batched:
            return math.ceil(2 * self._k / self._shards) + (4 if self._shards > 1 else 0)
        return candidates(columns, self._shards)

    # ---- lengths ---------------------------------------------------------------------------------

    def made(self, name: str, args: Any, kwargs: Any, frame: FrameType | None) -> Tensor | None:
        """The result of an operation whose length only the device knows; None if this is none."""
        if name == "nonzero":
            return _there(args[0], self._found(args[0], _function(frame)), args[0].dim())
        if name == "bincount":
            return _there(args[0], kwargs.get("minlength", args[-1]))
        if name == "repeat_interleave" and isinstance(args[0], Tensor) and len(args) == 1:
            numbers = _facts(args[0])
            if kwargs.get("output_size") is None and None not in numbers:
                return _there(args[0], int(sum(number or 0 for number in numbers)))
        if name == "index" and _masks(args[1]):
            source, (mask, *_) = args[0], args[1]
            return torch.empty(
                mask.numel(), *source.shape[mask.dim() :], dtype=source.dtype, device=source.device
            )
        return None

    def _found(self, asked: Tensor, function: str) -> int:
        if function == "silent":
            return self._dead
        if function == "segments_of":
            # chosen entries of codes that are padded to the fullest row
            here = self._k / self._shards
            width = (
                2 * here + (4 if self._shards > 1 else 0)
                if self._batched
                else candidates(self._k, self._shards)
            )
            return int(asked.numel() * min(1.0, here / width))
        return 0  # ties, and rows to be done again


def _there(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.int64, device=like.device)


def _masks(indices: Any) -> bool:
    first = indices[0] if indices else None
    return isinstance(first, Tensor) and first.dtype == torch.bool


def _sent(tensor: Tensor) -> list[Number] | None:
    if tensor.numel() > _KNOWN or type(tensor) is not Tensor:
        return None
    with _disable_current_modes():
        return tensor.flatten().tolist()


def _facts(tensor: Tensor) -> list[Number | None]:
    """What is known of a tensor's numbers, flat."""
    fact = getattr(tensor, "_usual", None)
    return list(fact) if isinstance(fact, list) else [fact] * tensor.numel()


def _function(frame: FrameType | None) -> str:
    """The innermost function that is no comprehension."""
    while frame is not None and frame.f_code.co_name.startswith("<"):
        frame = frame.f_back
    return frame.f_code.co_name if frame is not None else ""
