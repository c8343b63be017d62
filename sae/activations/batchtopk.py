"""BatchTopK: trained on the K best per row of a batch, used with one threshold (Bussmann et al. 2024)."""

from __future__ import annotations

from torch import Tensor

from winnow.sae.activations.base import Activation, Latents
from winnow.schemas.activations import traits_of


class BatchTopK(Activation):
    """See the module; the threshold comes from `winnow.trainer.run.threshold`."""

    traits = traits_of("batchtopk")

    def floor(self, sae: Latents) -> Tensor | float:
        """See `Activation.floor`."""
        # one threshold in place of the batch: a row's codes must not depend on the rows beside it
        return sae.threshold.detach()


ACTIVATION = BatchTopK()
