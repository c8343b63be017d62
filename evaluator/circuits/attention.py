"""Attention with its pattern held: what each position reads from which is recorded once and used again.

Letters: P positions, H heads, G groups of heads with keys and values of their own, d width of a head.

transformers' attention interface is the door: every attention module hands its queries, keys and values to
one registered function. While a prompt is recorded, that function calls the module's own eager attention,
whose second result is the pattern [1, H, P, P]; after that it only multiplies patterns with values.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from torch import Tensor, nn

_NAME = "winnow_held"

TOLERANCE = 1e-4
"""Largest relative difference between what attention gave and pattern times values."""


class NotHeld(Exception):
    """The attention of this module cannot be held."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(type(module).__name__)
        self.module = module


class Patterns:
    """The patterns of one prompt.

    Attributes:
        held: Attention module -> its pattern [1, H, P, P].
    """

    active: Patterns | None = None
    """The one that the registered function uses: a model's passes are not run by several threads at once."""

    def __init__(self) -> None:
        self.held: dict[nn.Module, Tensor] = {}
        self._recording = False

    @contextmanager
    def used(self, model: transformers.PreTrainedModel, *, record: bool = False) -> Iterator[None]:
        """While open, a pass of the model records its patterns, or uses the recorded ones."""
        _register()
        config: Any = model.config.get_text_config()
        before, self._recording = config._attn_implementation, record
        config._attn_implementation, Patterns.active = _NAME, self
        try:
            yield
        finally:
            config._attn_implementation, Patterns.active = before, None

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any
    ) -> Tensor:
        """Return attention's output [1, P, H, d]."""
        if not self._recording:
            positions = value.shape[2]
            return _applied(self.held[module][..., :positions, :positions], value)
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if eager is None or module in self.held:
            raise NotHeld(module)
        output, pattern = eager(module, query, key, value, mask, **rest)
        if not isinstance(pattern, Tensor) or pattern.shape[-1] != value.shape[2]:
            raise NotHeld(module)
        found = _applied(pattern, value)
        if found.shape != output.shape or (found - output).abs().max() > TOLERANCE * output.abs().max():
            raise NotHeld(module)
        self.held[module] = pattern.detach()
        return found


def _applied(pattern: Tensor, value: Tensor) -> Tensor:
    """Multiply a pattern [1, H, P, P] with values [1, G, P, d]; returns [1, P, H, d]."""
    (_, heads, positions, _), (one, groups, keys, width) = pattern.shape, value.shape
    # The heads of a group side by side, so that its values are not repeated for each of them.
    joined = pattern.reshape(1, groups, heads // groups * positions, keys) @ value
    return joined.view(one, heads, positions, width).transpose(1, 2).contiguous()


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any) -> Any:
    """What transformers calls."""
    assert Patterns.active is not None
    return Patterns.active.attend(module, query, key, value, mask, **rest), None


def _register() -> None:
    """Make the function and its masks known to transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
