"""Keeps the documents of a window apart: positions that restart, and a check that the subject obeys them.

Letters: W windows, T positions, D width.

With positions that restart at 0, no cache and no mask, most architectures of transformers attend inside a
document only, exactly. Others ignore the restart without a word: ALiBi and OPT's learned positions count
from the mask, recurrences carry their state on, chunked attention counts from the window's start. So it is
tried on the subject itself.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from winnow.schemas.errors import ConfigError
from winnow.subject.pretrained import first_line

Run = Callable[[Tensor, Tensor | None], Tensor]
"""(ids int64 [W, T], positions int64 [W, T] or None) -> the last block's rows [W, T, D]."""

# Masked attention gives the same bits whatever is masked; experts that get other numbers of rows move by 1e-7
# in float32. What is let through moves rows by 1e-2 and more.
_LEAK = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Largest relative change (Euclidean norm) of a row that is float noise, if another document changes."""
# SmolLM2-135M in float32 is 7e-6 off, and 0.78 where it sees earlier documents. In bfloat16 single rows are
# up to 0.17 off, so there half of a document's rows decide; a wrong position would move all of them.
_OFF = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 0.15}
"""Largest difference between a row in a window and alone, over the row's own spread, that is float noise."""


def checked_positions(positions: Any, ids: Tensor) -> Tensor:
    """Positions as int64 [W, T] on the device of `ids`; ConfigError unless they count documents."""
    found = torch.as_tensor(positions).to(ids.device, torch.int64)
    shape = tuple(ids.shape)
    right = tuple(found.shape) == shape and not bool(found[:, 0].any())
    if not right or bool(((found[:, 1:] != found[:, :-1] + 1) & (found[:, 1:] != 0)).any()):
        raise ConfigError(
            "positions",
            expected=f"integers {list(shape)}: 0, 1, 2, ... in each document of a window",
            got=list(found.shape) if tuple(found.shape) != shape else "other numbers",
        )
    return found


def check_apart(run: Run, vocabulary: int, length: int, name: str) -> None:
    """Check that rows of packed documents are those of each alone, on two windows of `length` tokens.

    Args:
        run: Runs the subject without a cache.
        vocabulary: Number of token ids.
        length: T, that of the windows that will be run: chunked attention differs past its chunk only.
        name: Name of the subject, for messages.

    Raises:
        ConfigError: They are not, or the subject takes no positions.
    """
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (2, length), generator=draw)
    # Cut at other places in each window, since a model might take the first window's positions for all.
    cuts = [sorted({0, length // third, length - length // 5, length}) for third in (3, 2)]
    owner, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    for window, edges in enumerate(cuts):
        for number, (low, high) in enumerate(pairwise(edges)):
            owner[window, low:high], positions[window, low:high] = number, torch.arange(high - low)
    try:
        with torch.no_grad():
            packed = run(ids, positions)
            _check_alone(run, ids, cuts, packed, name)
            _check_leak(run, ids, positions, owner, packed, vocabulary, name)
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model's own code may raise anything
        raise _refused(name, f"{type(error).__name__}: {first_line(error)}") from error


def _check_alone(run: Run, ids: Tensor, cuts: list[list[int]], packed: Tensor, name: str) -> None:
    for window, edges in enumerate(cuts):
        for low, high in pairwise(edges):
            alone = run(ids[window : window + 1, low:high], None)[0]
            if not _alike(packed[window, low:high], alone):
                raise _refused(name, f"other rows in a window of {ids.shape[1]} tokens than alone")


def _alike(found: Tensor, expected: Tensor) -> bool:
    """Whether rows [T, D] are equal up to float noise; tokens that are never given have infinite logits."""
    finite = expected.isfinite()
    if found.shape != expected.shape or not torch.equal(found.isfinite(), finite):
        return False
    a, b = (torch.where(finite, rows, 0).float() for rows in (found, expected))
    off = (a - b).square().mean(-1).sqrt() / b.std(-1, correction=0).clamp_min(
        torch.finfo(torch.float32).tiny
    )
    worst = off.max() if expected.dtype == torch.float32 else off.median()
    return float(worst) <= _OFF.get(expected.dtype, 1e-3)


def _check_leak(
    run: Run, ids: Tensor, positions: Tensor, owner: Tensor, packed: Tensor, vocabulary: int, name: str
) -> None:
    """Refuse a subject in which the rows of one document move when the tokens of another change."""
    # Sharper than the comparison with documents alone, whose passes have other shapes and so other noise.
    for changed in (0, 1):
        other = torch.where(owner == changed, (ids + max(1, vocabulary // 5)) % vocabulary, ids)
        before, after = (
            rows[(owner != changed).to(rows.device)].float() for rows in (packed, run(other, positions))
        )
        finite = before.isfinite() & after.isfinite()
        before, after = before.where(finite, 0), after.where(finite, 0)
        moved = (before - after).norm(dim=-1) / before.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        if float(moved.max()) > _LEAK.get(packed.dtype, 0.0):
            got = f"rows that move by {float(moved.max()):.1e} with the tokens of another document"
            raise _refused(name, got)


def _refused(name: str, got: str) -> ConfigError:
    return ConfigError(
        f"plan.attend: document: subject {name!r} does not keep the documents of a window apart",
        expected="rows as if each document were run alone",
        got=got,
        fix="Set plan.attend: window, or take another subject",
    )
