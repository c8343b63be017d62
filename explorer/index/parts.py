"""What the index holds about the parts of a crosscoder: the hooks, of one or several subjects, that it reads.

Letters: B rows, S slots of the codes, N latents, H parts, D width of a part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.sae.model import Sae
from winnow.schemas.features import IndexPart
from winnow.schemas.parts import part_names
from winnow.schemas.training import SaeCard

AXIS = "relative_norm."
"""What the summary's columns of relative norms begin with; the rest is the name of a part."""


def index_parts(card: SaeCard) -> tuple[IndexPart, ...]:
    """The parts of a crosscoder; none of another SAE."""
    names = part_names(card)
    hooks = card.input_hooks if names else ()
    return tuple(
        IndexPart(name=name, hook=hook, d_model=width)
        for name, hook, width in zip(names, hooks, card.parts.widths, strict=True)
    )


@torch.no_grad()
def contributions(sae: Sae, x: Tensor, indices: Tensor) -> Tensor:
    """What each part alone adds to the pre-activations of some latents.

    With `b_enc` the parts' contributions add up to the pre-activation, which is the activation of an active
    latent.

    Args:
        sae: A crosscoder.
        x: Raw rows [B, sum of D].
        indices: Latents [B, S] of each row.

    Returns:
        [B, S, H], in units of the normalised space.
    """
    centred = sae.normalise(x)[0] - sae.b_pre
    widths = list(sae.parts.widths)
    # Slot by slot: the encoder rows of all slots together would be B x S x D numbers.
    slots = [
        torch.stack([part.sum(1) for part in (sae.W_enc[slot] * centred).split(widths, dim=1)], dim=1)
        for slot in indices.unbind(1)
    ]
    return torch.stack(slots, dim=1)
