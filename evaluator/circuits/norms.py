"""Norms held as they were on a prompt: with its denominator fixed a norm is a linear map of its input.

Letters: n rows of any leading shape, D width that the norm works on.

RMSNorm gives `gain * x * r`, LayerNorm `gain * (x - mean(x)) * r + bias`, with r = 1 / denominator per row.
What a module computes is found out by running it on three probes, not by its class: libraries have dozens
of classes with another epsilon, a gain of `1 + weight`, or none. What fits neither is not held.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-4
"""Largest relative difference, in float32, between a norm's output and that of its held form."""


@dataclass
class HeldNorm:
    """A norm with the denominators of one pass."""

    centred: bool
    """Whether the mean over D is removed first, as LayerNorm does."""
    gain: Tensor
    """[D]; its scale is part of `ratio`."""
    bias: Tensor
    """[D]."""
    ratio: Tensor
    """[n, 1]: 1 / denominator, up to the scale of `gain`."""

    @classmethod
    @torch.no_grad()
    def fit(cls, module: nn.Module, x: Tensor, y: Tensor) -> HeldNorm | None:
        """The held form of a norm that gave y [n, D] for x [n, D]; None if it is not of a known form."""
        # `forward`, not the module itself: these calls are not part of the pass, so no hook may see them.
        ones = x.new_ones(1, x.shape[-1])
        bias, of_ones = module.forward(ones * 0), module.forward(ones)
        centred = bool((of_ones - bias).abs().max() <= TOLERANCE * (1 + bias.abs().max()))
        probe = ones.clone()
        if centred:
            probe[:, ::2] = -1
            probe = probe - probe.mean()
        gain = (module.forward(probe) - bias) / probe
        rows = gain * (x - x.mean(-1, keepdim=True) if centred else x)
        ratio = (rows * (y - bias)).sum(-1, keepdim=True) / rows.square().sum(-1, keepdim=True).clamp_min(
            1e-30
        )
        held = cls(centred, gain[0], bias[0], ratio)
        lost = (held(x) - y).abs().max()
        return held if lost <= TOLERANCE * y.abs().max().clamp_min(1e-30) else None

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the linear map to rows of the recorded prompt, or of its first positions."""
        ratio = self.ratio
        # Per-head norms have their positions at another axis: it is the one whose size differs.
        for axis, size in enumerate(x.shape[:-1]):
            ratio = ratio.narrow(axis, 0, size)
        rows = x - x.mean(-1, keepdim=True) if self.centred else x
        return self.gain * rows * ratio + self.bias


class Norms:
    """The norms of a model, held once a pass has been recorded.

    Attributes:
        held: Path -> its held form.
        unknown: Paths of norms whose form is not known; they run as they are.
    """

    def __init__(self, model: nn.Module, outside: tuple[str, ...]) -> None:
        """Find the norms of a model.

        Args:
            model: The model.
            outside: Paths below which norms are left alone: MLPs, whose outputs are given.
        """
        self._modules = {
            path: module
            for path, module in model.named_modules()
            if "norm" in type(module).__name__.lower()
            and not any(module.children())
            and not any(path == each or path.startswith(each + ".") for each in outside)
        }
        self.held: dict[str, HeldNorm] = {}
        self.unknown: set[str] = set()

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """While open, a pass fits each norm; its values stay the model's own."""

        def keep(path: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
            # A norm that runs twice has two denominators, and which one a later pass wants is not known.
            held = None if path in self.held else HeldNorm.fit(module, x, y)
            if held is None:
                self.unknown.add(path)
            else:
                self.held[path] = held

        with self._hooked(keep):
            yield
        for path in self.unknown:
            self.held.pop(path, None)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """While open, a pass over the recorded prompt, or its first positions, uses the held forms."""

        def replace(path: str, _: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
            return self.held[path](x).to(y.dtype) if path in self.held else None

        with self._hooked(replace):
            yield

    @contextmanager
    def _hooked(self, use: Any) -> Iterator[None]:
        def make(path: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
                x = args[0] if args else next(iter(kwargs.values()), None)
                if not isinstance(x, Tensor) or not isinstance(output, Tensor) or x.shape != output.shape:
                    self.unknown.add(path)
                    return None
                return use(path, module, x, output)

            return hook

        with ExitStack() as stack:
            for path, module in self._modules.items():
                handle = module.register_forward_hook(make(path), with_kwargs=True)
                stack.callback(handle.remove)
            yield
