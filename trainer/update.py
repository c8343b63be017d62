"""One pass over the parameters after the gradients are known: clipping, Adam, renormalisation, average.

The same numbers as the parts of `trainer.optim` one after the other. Each of those reads and writes whole
[N, D] tensors; here a block of latents goes through all of them while it is in cache.

Legend: D d_model, N latents.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adam import adam as functional_adam

from trainer.kernels.segment_grad import latent_blocks
from trainer.optim import Ema, renormalise_decoder
from trainer.sae import Sae


@torch.no_grad()
def fused_update(
    sae: Sae, adam: torch.optim.Adam, ema: Ema | None, *, lr: float, grad_norm: float, largest: float | None
) -> None:
    """Update weights, Adam's state and the moving average from the gradients in `.grad`.

    Args:
        sae: The model, with projected gradients.
        adam: Holds the state, in torch's own form, so that checkpoints do not tell who wrote it.
        ema: The moving average, where one is kept.
        lr: Learning rate of this step.
        grad_norm: Joint norm of all gradients.
        largest: Norm to clip to; null never clips.
    """
    group = adam.param_groups[0]
    group["lr"] = lr
    shrink = largest / grad_norm if largest is not None and grad_norm > largest else None
    if ema is not None:
        ema.steps += 1
    blocks = latent_blocks(sae.latents, sae.W_enc) if sae.W_enc.device.type == "cpu" else [slice(None)]
    for name in sae.parameter_names:
        parameter = getattr(sae, name)
        state = _state(adam, parameter)
        for block in blocks if name in ("W_enc", "W_dec") else [slice(None)]:
            weights, grad = parameter.detach()[block], parameter.grad[block]
            if shrink is not None:
                grad.mul_(shrink)
            functional_adam(
                [weights],
                [grad],
                [state["exp_avg"][block]],
                [state["exp_avg_sq"][block]],
                [],
                [state["step"].clone()],  # every block takes the same step
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=lr,
                weight_decay=0.0,
                eps=group["eps"],
                maximize=False,
            )
            if name == "W_dec":
                renormalise_decoder(weights)
            if ema is not None:
                ema.sums[name][block].lerp_(weights, 1 - ema.beta)
        state["step"] += 1


def _state(adam: torch.optim.Adam, parameter: Tensor) -> dict[str, Tensor]:
    """The parameter's state; a new one as torch's fused Adam begins it."""
    state = adam.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return state
