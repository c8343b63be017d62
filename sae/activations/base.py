"""What an activation must say of itself.

Legend: B rows, D width of the input, N latents, K active latents per row, S slots of padded codes.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from winnow.sae.codes import Codes, encode_above
from winnow.schemas.activations import Traits


class Latents(Protocol):
    """What an activation may ask of an SAE or of a shard of one."""

    # Properties, so that a module's parameters fit; a protocol, because the model imports the activations.
    @property
    def W_enc(self) -> Tensor:
        """[N, D]."""
        ...

    @property
    def threshold(self) -> Tensor:
        """[] or [N], as the activation's traits say."""
        ...

    @property
    def k(self) -> int:
        """K."""
        ...


class DenseCodes(NamedTuple):
    """Codes of an activation that selects nothing, while gradients are wanted."""

    values: Tensor
    """[B, N], at least 0."""
    counted: Tensor | None = None
    """[B]: what the sparsity term counts per row, where that is not made of the values."""


class Activation:
    """An activation; those that select codes have their training in `winnow.trainer.step.selection`."""

    traits: ClassVar[Traits]

    # ---- outside training --------------------------------------------------------------------------

    def floor(self, sae: Latents) -> Tensor | float:
        """What a pre-activation must exceed for its latent to be active: a number, [] or [N], at least 0."""
        raise NotImplementedError

    def select(self, sae: Latents, x: Tensor, b: Tensor) -> Codes:
        """Padded codes of normalised rows x [B, D]; b [N] is what the encoder's product is added to."""
        return encode_above(x, sae.W_enc, b, self.floor(sae))

    # ---- training of dense codes -------------------------------------------------------------------

    def begin(self, sae: Latents) -> None:
        """Fill what a new SAE holds for it beside the weights."""

    def codes(self, sae: Latents, pre: Tensor, bandwidth: float) -> DenseCodes:
        """Codes of pre-activations [B, N] cut at 0."""
        raise NotImplementedError

    def default_sparsity(self, d_model: int) -> float:  # noqa: ARG002
        """Weight of the sparsity term where the spec does not say; 0 where it has none."""
        return 0.0

    joint: ClassVar[bool] = False
    """Whether the sparsity term is not linear in the rows, and so is one of all ranks' rows together."""

    def counted(self, codes: DenseCodes) -> Tensor:
        """What the sparsity term counts per row [B], of the latents at hand."""
        raise NotImplementedError

    def sparsity(self, counted: Tensor, total: Tensor, k: int, constant: float, weight: float) -> Tensor:
        """The sparsity term [].

        Args:
            counted: Weighted sum [] of `counted` over all latents, and over the rows.
            total: Weight of the whole batch [].
            k: K.
            constant: The loss constant: the mean squared distance of rows from their mean.
            weight: Of the term.
        """
        raise NotImplementedError

    def after_step(self, sae: Latents) -> None:
        """Bring back into bounds what an update may have moved out of them."""
