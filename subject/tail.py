"""Runs a subject from a hook upward: once whole, then only the blocks above the hook, any number of times.

Letters: W windows, T positions, D width at the hook, V vocabulary, n variants of one window.

Every variant of an activation needs the same lower blocks, so they run once (`Tail.start`). After that
the blocks below the hook return their earlier output, and only the blocks above are computed:
`Tail.patched` for whole windows, `Tail.continued` for a few positions after the one that changed, with
the keys and values of the positions before it taken from the first pass. Equal to the whole forward pass
with the hook replaced (`Subject.logits(..., replace=...)`) up to float noise.

Not every architecture can be run so: a recurrence has no keys and values to begin from, and some upper
blocks need more of the lower ones than the stream (Gemma 4's shared keys). What may be skipped is therefore
tried, once per hook, on two short windows; if the logits differ there, it is computed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from winnow.schemas.errors import ConfigError
from winnow.schemas.subject import parse_hook
from winnow.subject.hooks import require_writable, resolve_hook
from winnow.subject.load import Subject
from winnow.subject.precise import in_float32
from winnow.subject.splice import Replacement, read_taps, rebuilt, replaced
from winnow.subject.steps import cache_argument, same_logits, trial_ids, turning_points

log = logging.getLogger("winnow.subject")

_TRIAL = 12
"""Positions of the windows of the trial."""


@dataclass(frozen=True)
class Pass:
    """The results of one whole, clean pass."""

    ids: Tensor
    """int64 [W, T]."""
    rows: Tensor
    """[W, T, D]: the activation at the hook."""
    logits: Tensor
    """[W, T, V]; empty if they were not asked for."""
    below: Any
    """The output of the last block that is skipped; None if none is."""
    continues: bool
    """Whether `continued` may use it."""
    cache: Any
    """Keys and values of every block, or None."""
    positions: Tensor | None = None
    """int64 [W, T]: places in documents, outside which no token sees; None if a token sees its window."""


class _Spared(NamedTuple):
    """The parts that a run from the hook upward skips."""

    blocks: bool
    """The blocks below the hook."""
    positions: bool
    """In `continued`, those before the one that changes."""


class Tail:
    """A whole subject and one hook.

    Args:
        subject: Loaded without `until`.
        hook: Any hook. Below `resid_pre.L` and `resid_post.L` every block is skipped; at another place
            inside block L that block runs again; outside the blocks nothing is skipped.

    Raises:
        ConfigError: The subject is truncated, or the hook is unknown or cannot be replaced.
    """

    def __init__(self, subject: Subject, hook: str) -> None:
        if subject.truncated:
            raise ConfigError(
                f"subject {subject.spec.model!r} was truncated",
                expected="the whole model",
                fix="Load it without `until`",
            )
        self.subject, self.hook = subject, hook
        self._model: Any = subject.model
        self._layout = subject.layout
        modules = {name for name, _ in subject.model.named_modules() if name}
        require_writable([hook])
        self._tap = resolve_hook(hook, subject.layout, modules)
        named = parse_hook(hook)
        layer = self._tap.layer or 0
        self._first = layer + 1 if named and named[0] == "resid_post" else layer
        self._turns = turning_points(subject.model.config.get_text_config())
        self._cache_argument = cache_argument(subject.model)

    @property
    def spared(self) -> float:
        """The share of the blocks that a patched pass skips."""
        return self._first / self._layout.layers if self._spares.blocks else 0.0

    def start(
        self, token_ids: Any, *, keep_cache: bool = False, logits: bool = True, positions: Any = None
    ) -> Pass:
        """Run one clean pass.

        Args:
            token_ids: Integers [W, T]; the logits have W*T*V numbers.
            keep_cache: Keep what `continued` needs. With `positions` there is no cache, and `continued` runs
                every position.
            logits: Run to the end; otherwise stop at the hook.
            positions: As for `Subject.logits`; every later pass from this one has them too.
        """
        ids = torch.as_tensor(token_ids.astype("int64") if hasattr(token_ids, "astype") else token_ids)
        ids = ids.to(self.subject.device, torch.int64)
        return self._start(ids, keep_cache, logits, self._spares, self.subject.checked(positions, ids))

    def patched(self, start: Pass, fn: Replacement) -> Tensor:
        """Logits [W, T, V] with the hook's rows replaced by `fn` of them.

        Args:
            start: The clean pass of the same windows.
            fn: Rows [W*T, D] -> the rows that replace them; it must not change its argument.
        """
        shape = (start.ids.shape[0], start.ids.shape[1])
        with torch.no_grad(), self._skipping(start.below), replaced(self._model, {self._tap: fn}, shape):
            return self._forward(start.ids, None, start.positions)

    def continued(self, start: Pass, window: int, first: int, stop: int, rows: Tensor) -> Tensor:
        """Logits of positions `first` to `stop - 1` of one window, with the row at `first` replaced.

        Args:
            start: A clean pass with `keep_cache`.
            window: Index of one of its W windows.
            first: The position that changes.
            stop: The end of the positions that are run, at most T.
            rows: [n, D], each a variant of the row at `first`.

        Returns:
            [n, stop - first, V] in the LM's dtype.
        """
        if not start.continues:
            raise ValueError("the clean pass was made without keep_cache")
        # Past LongRoPE's turn the clean pass's keys are rotated by the long factors, and a pass that ends
        # before it rotates its own by the short ones.
        if start.cache is None or any(stop <= turn < start.ids.shape[1] for turn in self._turns):
            return self._one_by_one(start, window, first, stop, rows)
        return self._continued(start, window, first, stop, rows)

    def _start(
        self, ids: Tensor, keep_cache: bool, logits: bool, spares: _Spared, positions: Tensor | None = None
    ) -> Pass:
        shape = (ids.shape[0], ids.shape[1])
        # With a cache transformers does not keep documents apart.
        cache = DynamicCache() if keep_cache and spares.positions and positions is None else None
        made: list[Any] = [torch.empty(0), None]

        def run() -> None:
            made[0] = self._forward(ids, cache, positions)

        def keep(_: Any, __: Any, output: Any) -> None:
            # Cloned: the blocks above may write into it.
            made[1] = _each(output, ids.shape, torch.clone)

        with ExitStack() as stack:
            if spares.blocks and self._first:
                stack.callback(self._block(self._first - 1).register_forward_hook(keep).remove)
            stack.enter_context(torch.no_grad())
            found = read_taps(self._model, [self._tap], run, shape, stop=not logits)
        return Pass(ids, found[self.hook], made[0], made[1], keep_cache, cache, positions)

    def _continued(self, start: Pass, window: int, first: int, stop: int, rows: Tensor) -> Tensor:
        """`continued`, with the keys and values of the positions before `first`."""
        n, length = len(rows), stop - first
        ids = start.ids[window, first:stop].expand(n, -1)
        here = start.rows[window, first:stop].repeat(n, 1, 1)
        here[:, 0] = rows.to(here.dtype)
        cache = self._prefix(start.cache, window, first, n)
        below = _each(
            start.below,
            start.ids.shape,
            lambda part: part[window, first:stop].expand(n, *[-1] * (part.ndim - 1)),
        )
        swap: Replacement = lambda _: here.reshape(n * length, -1)  # noqa: E731
        with torch.no_grad(), self._skipping(below), replaced(self._model, {self._tap: swap}, (n, length)):
            return self._forward(ids, cache, None)

    def _one_by_one(self, start: Pass, window: int, first: int, stop: int, rows: Tensor) -> Tensor:
        """`continued`, over all positions of the window."""
        # One variant at a time: the logits [T, V] of all of them would be too many.
        here = slice(window, window + 1)
        below = _each(start.below, start.ids.shape, lambda part: part[here])
        places = None if start.positions is None else start.positions[here]
        alone = Pass(start.ids[here], start.rows[here], start.logits, below, True, None, places)

        def one(row: Tensor) -> Replacement:
            def swap(x: Tensor) -> Tensor:
                x = x.clone()
                x[first] = row.to(x.dtype)
                return x

            return swap

        return torch.stack([self.patched(alone, one(row))[0, first:stop] for row in rows])

    @cached_property
    def _spares(self) -> _Spared:
        """The most that can be skipped such that the logits are those of whole passes."""
        ids = trial_ids(self._model, 2, _TRIAL)
        place = ids.shape[1] // 2

        # A row reversed: as large as a real one, and surely another one.
        def change(x: Tensor) -> Tensor:
            x = x.clone().view(*ids.shape, -1)
            x[:, place] = x[:, place].flip(-1)
            return x.flatten(0, 1)

        def holds(spares: _Spared) -> bool:
            start = self._start(ids, True, True, spares)
            row = start.rows[1, place].flip(-1)
            return (
                same_logits(self.patched(start, lambda x: x), clean)
                and same_logits(self.patched(start, change), changed)
                and same_logits(
                    self.continued(start, 1, place, ids.shape[1], row[None])[0], changed[1, place:]
                )
            )

        with in_float32(self._model, self._layout.blocks):
            clean = self.subject.logits(ids)
            changed = self.subject.logits(ids, {self.hook: change})
            for spares in (_Spared(True, True), _Spared(True, False)):
                try:
                    if holds(spares):
                        return spares
                # Gemma 4 with shared keys raises a KeyError, other models other errors.
                except Exception as error:
                    log.debug("%s at %s, %s: %r", self.subject.spec.model, self.hook, spares, error)
        log.warning("subject %s: every pass of %s is a whole one", self.subject.spec.model, self.hook)
        return _Spared(False, False)

    def _forward(self, ids: Tensor, cache: Any, positions: Tensor | None) -> Tensor:
        kept: dict[str, Any] = {} if cache is None else {self._cache_argument: cache}
        if positions is not None:
            kept["position_ids"] = positions
        return self._model(input_ids=ids, use_cache=cache is not None, **kept).logits

    def _block(self, layer: int) -> Any:
        return self._model.get_submodule(f"{self._layout.blocks}.{layer}")

    def _prefix(self, cache: Any, window: int, first: int, n: int) -> Any:
        """Keys and values of the positions before `first`, for n variants."""
        # Skipped blocks need none except the first, from which the model tells the number of earlier
        # positions.
        made = DynamicCache()
        for layer in sorted({0, *range(self._first, self._layout.layers)}):
            held = cache.layers[layer]
            keys, values = (
                part[window, :, :first].expand(n, -1, -1, -1) for part in (held.keys, held.values)
            )
            made.update(keys, values, layer)
        return made

    @contextmanager
    def _skipping(self, below: Any) -> Iterator[None]:
        """Let the blocks below the first one return `below` instead of computing; none if it is None."""
        # Set on the instance, which hides the class's method, and popped again. All skipped blocks return the
        # last one's output, since nothing reads it in between.
        with ExitStack() as stack:
            for layer in range(self._first if below is not None else 0):
                block = self._block(layer)
                block.forward = lambda *_, **__: below
                stack.callback(block.__dict__.pop, "forward")
            yield


def _each(output: Any, shape: torch.Size, make: Callable[[Tensor], Tensor]) -> Any:
    """A block's output with `make` applied to every tensor [W, T, ...] in it; `shape` is (W, T)."""
    if isinstance(output, Tensor):
        return make(output) if output.shape[:2] == shape else output
    if isinstance(output, (tuple, list)):
        return rebuilt(output, [_each(part, shape, make) for part in output])
    return output
