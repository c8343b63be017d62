"""Checks that a model is causal, that is, that no position depends on a later one, by running it.

Masked language models (BERT, RoBERTa, ELECTRA, ...) without `is_decoder` load as causal ones too, and then
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

# No width that models have, so that the axis of positions is recognised wherever a block's output has it.
LENGTH = 13
"""T."""
_CHANGED = 6
"""Positions at the end whose tokens differ in the second pass."""
# Most models give the same bits. If experts get other numbers of rows, tiny models of every architecture of
# transformers 5.23 moved by 1e-7 at most in float32; encoders without `is_decoder` moved by 2e-2 and more.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Largest relative change (Euclidean norm) of an early position's row that counts as float noise."""


def check_causal(
    model: nn.Module, blocks: Sequence[str], run: Callable[[Tensor], object], vocabulary: int, name: str
) -> None:
    """Check that two short passes that differ in their last tokens agree before those, after every block.

    Args:
        model: The model that has the blocks.
        blocks: Paths of the blocks, in the order in which they run.
        run: Runs the model on ids int64 [1, T]; what follows the last block may be missing.
        vocabulary: V.
        name: Name of the subject, for messages.

    Raises:
        ConfigError: An earlier position changes, or the model cannot run such a pass.
    """
    ids = probe_ids(vocabulary)
    other = ids.clone()
    other[-_CHANGED:] = (ids[-_CHANGED:] + max(1, vocabulary // 5)) % vocabulary
    before, after = (_outputs(model, blocks, run, tokens[None], name) for tokens in (ids, other))
    if not before:
        raise ConfigError(
            f"subject {name!r} is no causal language model, as far as its blocks tell",
            expected="blocks that give a row for each token",
            got=f"no output of {LENGTH} rows from {blocks[0]} or any other",
        )
    # The first block in which the passes differ decides: noise is smallest there.
    for path in before:
        moved = _moved(before[path], after[path])
        # NaN: the harvest finds it, and names unit, hook and window.
        if moved == 0 or moved != moved:
            continue
        if moved > _TOLERANCE.get(before[path].dtype, 0.0):
            raise ConfigError(
                f"subject {name!r} is no causal language model: a position depends on later tokens",
                expected="early rows that stay as they are when the last tokens of a window change",
                got=f"rows that move by {moved:.1e} of their norm at {path}",
                fix="Take a decoder; an encoder like BERT is one only with `is_decoder` in its config",
            )
        return


def probe_ids(vocabulary: int) -> Tensor:
    """Ids int64 [T] of a short pass that tries a model of V tokens."""
    # Spread over the vocabulary from its second quarter on: special tokens, which a model may treat
    # differently, usually are the first ids.
    return (vocabulary // 4 + torch.arange(LENGTH) * max(1, vocabulary // 64)) % vocabulary


def _outputs(
    model: nn.Module, blocks: Sequence[str], run: Callable[[Tensor], object], ids: Tensor, name: str
) -> dict[str, Tensor]:
    """Block -> its early output rows [LENGTH - CHANGED, ...]; blocks without such an axis are left out."""
    found: dict[str, Tensor] = {}
    try:
        with torch.no_grad(), _watched(model, blocks, found), suppress(_Enough):
            run(ids)
    # Says nothing about the model, as the sentence below would.
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model's own code may raise anything
        raise ConfigError(
            f"subject {name!r} cannot run a window of {LENGTH} tokens",
            got=f"{type(error).__name__}: {first_line(error)}",
        ) from error
    return found


class _Enough(Exception):
    """Ends the pass after the last block, since nothing later is needed."""


@contextmanager
def _watched(model: nn.Module, blocks: Sequence[str], found: dict[str, Tensor]) -> Iterator[None]:
    with ExitStack() as stack:
        for path in blocks:
            # `path` as a default, or every hook would see the loop's last one.
            def keep(_: nn.Module, __: Any, output: Any, path: str = path) -> None:
                value = output[0] if isinstance(output, (tuple, list)) and output else output
                if isinstance(value, Tensor) and value.is_floating_point() and LENGTH in value.shape:
                    # Not every block returns [windows, T, ...].
                    axis = value.shape.index(LENGTH)
                    found[path] = value.movedim(axis, 0)[: LENGTH - _CHANGED].clone()
                if path == blocks[-1]:
                    raise _Enough

            stack.callback(model.get_submodule(path).register_forward_hook(keep).remove)
        yield


def _moved(before: Tensor, after: Tensor) -> float:
    """The largest relative change of a position's row."""
    if torch.equal(before, after):
        return 0.0
    a, b = (value.reshape(len(value), -1).float() for value in (before, after))
    return float(((a - b).norm(dim=1) / a.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)).max())
