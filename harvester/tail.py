"""Run a subject from a hook upward: once whole, then only the blocks above the hook, again and again.

Letters: W windows, T positions, D width at the hook, V vocabulary, n variants of one window.

Every variant of an activation needs the same lower blocks, so they run once (`Tail.start`). After that
the blocks below the hook hand on what they gave then, and only what lies above is computed:
`Tail.patched` for whole windows, `Tail.continued` for a few positions after the one that changed, with
the keys and values of the positions before it taken from the first pass. Equal to the whole forward pass
with the hook replaced (`Subject.logits(..., replace=...)`) up to float noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from harvester.hooks import Tap, resolve_hook
from harvester.splice import Replacement, read, replaced
from harvester.subject import Subject
from schemas.errors import ConfigError
from schemas.subject import parse_hook


@dataclass(frozen=True)
class Pass:
    """What one whole, clean pass left behind."""

    ids: Tensor
    """int64 [W, T]."""
    rows: Tensor
    """[W, T, D]: the activation at the hook."""
    logits: Tensor
    """[W, T, V]; empty where they were not asked for."""
    below: Tensor | None
    """[W, T, width]: what enters the first block that is run again; None where all of them are."""
    cache: Any
    """Keys and values of every block, or None."""


class Tail:
    """A whole subject and one hook.

    Args:
        subject: Loaded without `until`.
        hook: Any hook. Below `resid_pre.L` and `resid_post.L` every block is spared; at another place
            inside block L that block runs again; outside the blocks nothing is spared.

    Raises:
        ConfigError: The subject is truncated, or the hook is unknown.
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
        self._tap = resolve_hook(hook, subject.layout, modules)
        named = parse_hook(hook)
        layer = self._tap.layer or 0
        self._first = layer + 1 if named and named[0] == "resid_post" else layer
        self._at_edge = named is not None and named[0].startswith("resid_") and self._first > 0
        self._kinds: dict[int, int | None] = {}

    @property
    def spared(self) -> float:
        """Share of the blocks that a patched pass does not run."""
        return self._first / self._layout.layers

    def start(self, token_ids: Any, *, keep_cache: bool = False, logits: bool = True) -> Pass:
        """One clean pass.

        Args:
            token_ids: Integers [W, T]; the logits take W*T*V numbers.
            keep_cache: Keep keys and values, which `continued` needs.
            logits: Run it to its end; else it stops at the hook.
        """
        ids = torch.as_tensor(token_ids.astype("int64") if hasattr(token_ids, "astype") else token_ids)
        ids = ids.to(self.subject.device, torch.int64)
        cache = DynamicCache() if keep_cache else None
        taps, edge = [self._tap], None
        if self._first and not self._at_edge:
            edge = Tap(f"resid_post.{self._first - 1}", self._path(self._first - 1), False, self._first - 1)
            taps.append(edge)
        made = [torch.empty(0)]

        def run() -> None:
            made[0] = self._forward(ids, cache)

        with torch.no_grad(), self._observed():
            found = read(self._model, taps, run, (ids.shape[0], ids.shape[1]), stop=not logits)
        below = found[edge.hook] if edge else found[self.hook] if self._at_edge else None
        return Pass(ids, found[self.hook], made[0], below, cache)

    def patched(self, start: Pass, fn: Replacement) -> Tensor:
        """Logits [W, T, V] with the hook's rows replaced by `fn` of them.

        Args:
            start: The clean pass of the same windows.
            fn: Rows [W*T, D] -> the rows that take their place; it must not change its argument.
        """
        shape = (start.ids.shape[0], start.ids.shape[1])
        if self._at_edge:
            new = fn(start.rows.reshape(-1, start.rows.shape[-1]))
            below = new.to(start.rows.dtype).view_as(start.rows)
            with torch.no_grad(), self._skipping(below):
                return self._forward(start.ids, None)
        with torch.no_grad(), self._skipping(start.below), replaced(self._model, {self._tap: fn}, shape):
            return self._forward(start.ids, None)

    def continued(self, start: Pass, window: int, first: int, stop: int, rows: Tensor) -> Tensor:
        """Logits of positions `first` to `stop - 1` of one window, the row at `first` being another one.

        Args:
            start: A clean pass with `keep_cache`.
            window: Which of its W windows.
            first: The position that changes.
            stop: The end of the positions that are run, at most T.
            rows: [n, D], one variant each of the row at `first`.

        Returns:
            [n, stop - first, V] in the LM's dtype.
        """
        if start.cache is None:
            raise ValueError("the clean pass was made without keep_cache")
        n, length = len(rows), stop - first
        ids = start.ids[window, first:stop].expand(n, -1)
        here = start.rows[window, first:stop].repeat(n, 1, 1)
        here[:, 0] = rows.to(here.dtype)
        cache = self._prefix(start.cache, window, first, n)
        if self._at_edge:
            with torch.no_grad(), self._skipping(here):
                return self._forward(ids, cache)
        below = None if start.below is None else start.below[window, first:stop].expand(n, -1, -1)
        swap: Replacement = lambda _: here.reshape(n * length, -1)  # noqa: E731
        with (
            torch.no_grad(),
            self._skipping(below),
            replaced(self._model, {self._tap: swap}, (n, length)),
        ):
            return self._forward(ids, cache)

    def _forward(self, ids: Tensor, cache: Any) -> Tensor:
        return self._model(input_ids=ids, past_key_values=cache, use_cache=cache is not None).logits

    def _path(self, layer: int) -> str:
        return f"{self._layout.blocks}.{layer}"

    def _block(self, layer: int) -> Any:
        return self._model.get_submodule(self._path(layer))

    def _prefix(self, cache: Any, window: int, first: int, n: int) -> Any:
        """Keys and values of the positions before `first`, for n variants.

        Skipped blocks need none but the first, which tells the model how many positions went before.
        """
        made = DynamicCache()
        for layer in sorted({0, *range(self._first, self._layout.layers)}):
            held = cache.layers[layer]
            keys, values = (
                part[window, :, :first].expand(n, -1, -1, -1) for part in (held.keys, held.values)
            )
            made.update(keys, values, layer)
        return made

    @contextmanager
    def _observed(self) -> Iterator[None]:
        """Note whether each block below returns a tensor or a tuple of how many."""
        with ExitStack() as stack:
            for layer in range(self._first):

                def note(_: Any, __: Any, output: Any, layer: int = layer) -> None:
                    self._kinds[layer] = len(output) if isinstance(output, tuple) else None

                stack.callback(self._block(layer).register_forward_hook(note).remove)
            yield

    @contextmanager
    def _skipping(self, below: Tensor | None) -> Iterator[None]:
        """Blocks under the first one hand on `below` instead of computing."""
        with ExitStack() as stack:
            for layer in range(self._first):
                block = self._block(layer)
                block.forward = _handing_on(below, self._kinds[layer])
                stack.callback(block.__dict__.pop, "forward")
            yield


def _handing_on(value: Tensor | None, width: int | None) -> Callable[..., Any]:
    output: Any = value if width is None else (value, *[None] * (width - 1))
    return lambda *_, **__: output
