"""JumpReLU: all latents above their own trained threshold (Rajamanoharan et al. 2024, arXiv 2407.14435).

The sparsity term is weight * (L0/K - 1)^2, with straight-through gradients for the thresholds.
"""

from __future__ import annotations

from torch import Tensor

from winnow.sae.activations.base import Activation, DenseCodes, Latents
from winnow.sae.codes import jump_relu, step_above
from winnow.schemas.activations import traits_of

_FIRST_THRESHOLD = 0.001
"""Initial thresholds, in the normalised space (the paper's value)."""


class JumpReLU(Activation):
    """See the module."""

    traits = traits_of("jumprelu")
    joint = True

    def floor(self, sae: Latents) -> Tensor | float:
        """See `Activation.floor`."""
        return sae.threshold.detach()

    def begin(self, sae: Latents) -> None:
        """See `Activation.begin`."""
        sae.threshold.fill_(_FIRST_THRESHOLD)

    def codes(self, sae: Latents, pre: Tensor, bandwidth: float) -> DenseCodes:
        """See `Activation.codes`; counts active latents."""
        # counted by steps, not from the values: the thresholds need a gradient of L0
        active = step_above(pre, sae.threshold, bandwidth).sum(1)
        return DenseCodes(jump_relu(pre, sae.threshold, bandwidth), active)

    def default_sparsity(self, d_model: int) -> float:  # noqa: ARG002
        """See `Activation.default_sparsity`."""
        return 1.0

    def counted(self, codes: DenseCodes) -> Tensor:
        """See `Activation.counted`: L0."""
        assert codes.counted is not None
        return codes.counted

    def sparsity(self, counted: Tensor, total: Tensor, k: int, constant: float, weight: float) -> Tensor:  # noqa: ARG002
        """See `Activation.sparsity`."""
        return weight * (counted / total / k - 1).square()

    def after_step(self, sae: Latents) -> None:
        """See `Activation.after_step`: thresholds stay at or above 0."""
        # below 0 a latent could be active with a negative value, and codes are at least 0
        sae.threshold.detach().clamp_(min=0)


ACTIVATION = JumpReLU()
