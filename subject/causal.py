"""Whether a model is causal: whether a position depends on no later one. Seen by running it, not by its name.

Masked language models (BERT, RoBERTa, ELECTRA, ...) load as causal ones too, without `is_decoder`, and then
every row has seen the tokens that a loss or a continuation would predict.

Letters: T positions of the pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from winnow.schemas.errors import ConfigError
from winnow.subject.pretrained import first_line

LENGTH = 13
"""T; no width that models have, so that the axis of positions can be told wherever it stands."""
CHANGED = 6
"""Positions at the end whose tokens are others in the second pass."""
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Largest relative change (Euclidean norm) of an early position's row that is float noise.

Most models give the same bits. Where experts get other numbers of rows, tiny models of every architecture of
transformers 5.23 moved by 1e-7 at most in float32; encoders without `is_decoder` moved by 2e-2 and more.
"""


def check_causal(
    model: nn.Module, blocks: Sequence[str], run: Callable[[Tensor], object], vocabulary: int, name: str
) -> None:
    """Two short passes that differ in their last tokens must agree before those, in every block's output.

    The first block where they part decides: noise is smallest there.

    Args:
        model: The model that holds the blocks.
        blocks: Paths of the blocks that are there, in the order in which they run.
        run: Runs the model on ids int64 [1, T]; nothing after the last block is needed of it.
        vocabulary: V.
        name: The subject's, for messages.

    Raises:
        ConfigError: An earlier position changes, or the model cannot run such a pass.
    """
    ids = (vocabulary // 4 + torch.arange(LENGTH) * max(1, vocabulary // 64)) % vocabulary
    other = ids.clone()
    other[-CHANGED:] = (ids[-CHANGED:] + max(1, vocabulary // 5)) % vocabulary
    before, after = (_outputs(model, blocks, run, tokens[None], name) for tokens in (ids, other))
    if not before:
        raise ConfigError(
            f"subject {name!r} is no causal language model, as far as its blocks tell",
            expected="blocks that give a row for each token",
            got=f"no output of {LENGTH} rows from {blocks[0]} or any other",
        )
    for path in before:
        moved = _moved(before[path], after[path])
        if moved == 0 or moved != moved:  # NaN is found, and said, by the harvest
            continue
        if moved > _TOLERANCE.get(before[path].dtype, 0.0):
            raise ConfigError(
                f"subject {name!r} is no causal language model: a position depends on later tokens",
                expected="early rows that stay as they are when the last tokens of a window change",
                got=f"rows that move by {moved:.1e} of their norm at {path}",
                fix="Take a decoder; an encoder like BERT is one only with `is_decoder` in its config",
            )
        return


def _outputs(
    model: nn.Module, blocks: Sequence[str], run: Callable[[Tensor], object], ids: Tensor, name: str
) -> dict[str, Tensor]:
    """Block -> the early rows [LENGTH - CHANGED, ...] it gives; blocks without such an axis are left out."""
    found: dict[str, Tensor] = {}
    try:
        with torch.no_grad(), _watched(model, blocks, found), suppress(_Enough):
            run(ids)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model's own code may raise anything
        raise ConfigError(
            f"subject {name!r} cannot run a window of {LENGTH} tokens",
            got=f"{type(error).__name__}: {first_line(error)}",
        ) from error
    return found


class _Enough(Exception):
    """The last block has run."""


@contextmanager
def _watched(model: nn.Module, blocks: Sequence[str], found: dict[str, Tensor]) -> Iterator[None]:
    with ExitStack() as stack:
        for path in blocks:

            def keep(_: nn.Module, __: Any, output: Any, path: str = path) -> None:
                value = output[0] if isinstance(output, (tuple, list)) and output else output
                if isinstance(value, Tensor) and value.is_floating_point() and LENGTH in value.shape:
                    axis = value.shape.index(LENGTH)
                    found[path] = value.movedim(axis, 0)[: LENGTH - CHANGED].clone()
                if path == blocks[-1]:
                    raise _Enough

            stack.callback(model.get_submodule(path).register_forward_hook(keep).remove)
        yield


def _moved(before: Tensor, after: Tensor) -> float:
    """The largest relative change of a position's numbers."""
    if torch.equal(before, after):
        return 0.0
    a, b = (value.reshape(len(value), -1).float() for value in (before, after))
    return float(((a - b).norm(dim=1) / a.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)).max())
