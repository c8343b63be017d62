"""ReLU with an L1 term: all latents above 0 (Anthropic, April 2024).

The term is weight * sum |z| per row, over sqrt(constant).
"""

from __future__ import annotations

from torch import Tensor

from winnow.sae.activations.base import Activation, DenseCodes, Latents
from winnow.schemas.activations import traits_of


class ReLU(Activation):
    """See the module."""

    traits = traits_of("relu")

    def floor(self, sae: Latents) -> Tensor | float:  # noqa: ARG002
        """See `Activation.floor`."""
        return 0.0

    def codes(self, sae: Latents, pre: Tensor, bandwidth: float) -> DenseCodes:  # noqa: ARG002
        """See `Activation.codes`."""
        return DenseCodes(pre)

    def default_sparsity(self, d_model: int) -> float:
        """See `Activation.default_sparsity`."""
        return 5 / d_model**0.5

    def counted(self, codes: DenseCodes) -> Tensor:
        """See `Activation.counted`: |z|, summed."""
        # codes are at least 0, so |z| is z
        return codes.values.sum(1)

    def sparsity(self, counted: Tensor, total: Tensor, k: int, constant: float, weight: float) -> Tensor:  # noqa: ARG002
        """See `Activation.sparsity`."""
        # the root cancels the scale of the rows; the decoder's have unit norm, so that no latent evades the
        # term by a long direction
        return weight * counted / (total * constant**0.5)


ACTIVATION = ReLU()
