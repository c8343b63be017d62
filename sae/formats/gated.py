"""Gated SAEs as JumpReLU: the same codes, exactly.

Legend: D width, N latents.

A gated encoder is active where ``x W + b_gate > 0``, and is ``relu(e^r (x W) + b_mag)`` there. With
``y = e^r (x W) + b_mag`` the gate says ``y > b_mag - e^r b_gate``: a threshold for each latent.
"""

from __future__ import annotations

from torch import Tensor


def as_jumprelu(W_enc: Tensor, b_gate: Tensor, b_mag: Tensor, r_mag: Tensor) -> tuple[Tensor, Tensor]:
    """The encoder [N, D] and the thresholds [N] of a JumpReLU whose bias is `b_mag`, in double precision.

    Args:
        W_enc: Encoder of the gate [N, D].
        b_gate: Bias of the gate [N].
        b_mag: Bias of the magnitude [N].
        r_mag: Logarithm of the magnitude's scale [N].
    """
    # In double precision, since the two biases may nearly cancel.
    scale = r_mag.double().exp()
    return W_enc.double() * scale[:, None], b_mag.double() - scale * b_gate.double()
