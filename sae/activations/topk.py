"""TopK: the K best latents of each row (Gao et al. 2024, arXiv 2406.04093)."""

from __future__ import annotations

from torch import Tensor

from winnow.sae.activations.base import Activation, Latents
from winnow.sae.codes import Codes, encode_topk
from winnow.schemas.activations import traits_of


class TopK(Activation):
    """See the module."""

    traits = traits_of("topk")

    def select(self, sae: Latents, x: Tensor, b: Tensor) -> Codes:
        """See `Activation.select`; S is K."""
        # also outside training: K per row needs no threshold
        return encode_topk(x, sae.W_enc, b, sae.k)


ACTIVATION = TopK()
