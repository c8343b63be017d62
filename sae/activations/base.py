"""The interface of an activation.

Legend: B rows, D width of the input, N latents, K active latents per row, S slots of padded codes.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from winnow.sae.codes import Codes, encode_above
from winnow.schemas.activations import Traits


class Latents(Protocol):
    """What an activation may read of an SAE or of a shard of one."""

    # Properties, so that a module's parameters fit; a protocol, because the model imports the activations.
    @property
    def W_enc(self) -> Tensor:
        """[N, D]."""
        ...

    @property
    def threshold(self) -> Tensor:
        """[] or [N], according to the activation's traits."""
        ...

    @property
    def k(self) -> int:
        """K."""
        ...


class DenseCodes(NamedTuple):
    """Codes of an activation that selects nothing, while gradients are wanted."""

    values: Tensor
    """[B, N], at least 0."""
    # JumpReLU counts with a gradient of its own, which the values cannot carry
    counted: Tensor | None = None
    """[B]: what the sparsity term counts per row, unless that follows from the values."""


class Activation:
    """An activation; those that select codes have their training in `winnow.trainer.step.selection`."""

    traits: ClassVar[Traits]

    # ---- outside training --------------------------------------------------------------------------

    def floor(self, sae: Latents) -> Tensor | float:
        """What a pre-activation must exceed for its latent to be active: a number, [] or [N], at least 0."""
        raise NotImplementedError

    def select(self, sae: Latents, x: Tensor, b: Tensor) -> Codes:
        """Padded codes of normalised rows x [B, D]; b [N] is what the encoder's product is added to."""
        # outside training a threshold defines the codes; one that keeps the best by number overrides this
        return encode_above(x, sae.W_enc, b, self.floor(sae))

    # ---- training of dense codes -------------------------------------------------------------------

    def begin(self, sae: Latents) -> None:
        """Initialise what a new SAE holds for it besides the weights."""

    def codes(self, sae: Latents, pre: Tensor, bandwidth: float) -> DenseCodes:
        """Codes of pre-activations [B, N] cut at 0."""
        raise NotImplementedError

    def default_sparsity(self, d_model: int) -> float:  # noqa: ARG002
        """Weight of the sparsity term, unless the spec sets it; 0 if there is no such term."""
        return 0.0

    # with JumpReLU's (L0/K - 1)^2 the ranks' L0 must be summed before the square
    joint: ClassVar[bool] = False
    """Whether the sparsity term is not linear in the rows, and is therefore one term of all ranks' rows."""

    def counted(self, codes: DenseCodes) -> Tensor:
        """What the sparsity term counts per row [B], over this shard's latents."""
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
        """Bring parameters back into bounds after an update."""
