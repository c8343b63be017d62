"""One pass over the parameters after the gradients are known: clipping, Adam, renormalisation, average.

The same numbers as the parts of `winnow.trainer.step.optim` one after the other.

Legend: D d_model, N latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from winnow.sae.activations import activation_of
from winnow.sae.model import Sae
from winnow.schemas.training import MomentsDtype, TrainSpec
from winnow.trainer.kernels.fused_ops import AdamStep, FusedOps
from winnow.trainer.kernels.segment_grad import BLOCK_BYTES, GPU_BLOCK_BYTES, latent_blocks
from winnow.trainer.step.moments import PACKED, Moments, State, new_state, pack_moments, unpack_moments
from winnow.trainer.step.optim import Ema, clip_gradients, renormalise_decoder
from winnow.trainer.step.state import Run


@torch.no_grad()
def fused_update(
    sae: Sae,
    adam: torch.optim.Adam,
    ema: Ema | None,
    *,
    lr: float,
    grad_norm: float,
    largest: float | None,
    moments: MomentsDtype = "float32",
    step: int = 0,
    early: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Update weights, Adam's state and the moving average from the gradients in `.grad`.

    Args:
        sae: The model, with projected gradients.
        adam: Holds the state, in torch's own form, whichever update writes it.
        ema: The moving average, if one is kept.
        lr: Learning rate of this step.
        grad_norm: Joint norm of all gradients.
        largest: Norm to clip to; None never clips.
        moments: How Adam's moments are stored; see `winnow.trainer.step.moments`.
        step: The step's number, from which packed moments draw their rounding.
        early: What `update_matrices` gave.
    """
    group = adam.param_groups[0]
    group["lr"] = lr
    shrink = largest / grad_norm if largest is not None and grad_norm > largest else None
    if ema is not None:
        ema.steps += 1
    # from the step's number, not from a generator that runs on: a resumed run draws the same bits
    draws = torch.Generator(sae.W_enc.device).manual_seed(step)
    size = BLOCK_BYTES if sae.W_enc.device.type == "cpu" else GPU_BLOCK_BYTES
    for name in sae.parameter_names:
        parameter = getattr(sae, name)
        state = state_of(adam, parameter, moments if name in PACKED else "float32")
        if name in early:
            # filled with a number that the host knows, and may then know without asking (`Run.adam_steps`)
            state["step"] = torch.full_like(state["step"], early[name])
            continue
        # a block goes through everything while it is in cache: 35 ms of thread time instead of 87 for passes
        # over whole [N, D] tensors (docs/kernels.md)
        matrix = name in ("W_enc", "W_dec")
        now = state["step"] + 1
        for block in latent_blocks(sae.latents, parameter, size) if matrix else [slice(None)]:
            weights, grad = parameter.detach()[block], parameter.grad[block]
            if shrink is not None:
                # not in place: the block's copy is still in cache when the next one takes its memory, while a
                # changed gradient would have to be written back
                grad = grad * shrink
            unpacked = unpack_moments(state, block, weights)
            _adam(group, weights, grad, unpacked, now, lr=lr)
            pack_moments(state, block, unpacked, draws)
            if name == "W_dec":
                renormalise_decoder(weights)
            # last, since the average is of the weights as the step leaves them
            if ema is not None:
                ema.sums[name][block].lerp_(weights, 1 - ema.beta)
        state["step"] += 1


@torch.no_grad()
def update_matrices(
    fused: FusedOps, run: Run, loss: Tensor, norm: Tensor, *, lr: float, spec: TrainSpec, step: int
) -> dict[str, int]:
    """The same for both matrices by a kernel, unless loss [] or norm [] turns out not to be finite.

    Adam's count of steps and the average's stay as they are: `fused_update` takes them on.

    Returns:
        Name -> the number of Adam's step, from 1.
    """
    sae, group, numbers = run.sae, run.adam.param_groups[0], dict[str, int]()
    for place, name in enumerate(PACKED):
        parameter = getattr(sae, name)
        state = state_of(run.adam, parameter, spec.moments)
        numbers[name] = run.adam_steps.of(name, state["step"]) + 1
        fused.update_rows(
            parameter.detach(),
            parameter.grad,
            state,
            AdamStep(lr, group["betas"], group["eps"], numbers[name]),
            loss,
            norm,
            largest=spec.clip_norm,
            unit=name == "W_dec",
            average=None if run.ema is None else (run.ema.sums[name], 1 - run.ema.beta),
            low=run.rounded.written(name),
            # every step and matrix has its own bits
            seed=len(PACKED) * step + place,
        )
    return numbers


def state_of(adam: torch.optim.Adam, parameter: Tensor, moments: MomentsDtype) -> State:
    """Adam's state of a parameter, begun if it has none."""
    state = adam.state[parameter]
    if not state:
        state |= new_state(parameter.detach(), moments)
    return state


def _adam(
    group: dict[str, Any], weights: Tensor, grad: Tensor, unpacked: Moments, step: Tensor, *, lr: float
) -> None:
    """Take step number `step` [], from 1, of torch's fused Adam on a block, in place."""
    # the operation itself: `torch.optim.adam.adam` sorts its lists by device and type on every call
    torch._fused_adam_(  # pyright: ignore[reportPrivateImportUsage]
        [weights],
        [grad],
        [unpacked.first],
        [unpacked.second],
        [],
        [step],
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=lr,
        weight_decay=0.0,
        eps=group["eps"],
        maximize=False,
    )


def plain_update(
    sae: Sae, adam: torch.optim.Adam, ema: Ema | None, *, lr: float, grad_norm: float, largest: float | None
) -> None:
    """The specification of `fused_update`: clipping, Adam, renormalisation and average, one after the other.

    Arguments as there. Thresholds are not clipped.
    """
    # a threshold's gradient has the scale of the bandwidth, which must not decide how all others are clipped
    names = [name for name in sae.parameter_names if name != "threshold"]
    clip_gradients([getattr(sae, name) for name in names], largest, grad_norm)
    for group in adam.param_groups:
        group["lr"] = lr
    adam.step()
    renormalise_decoder(sae.W_dec)
    activation_of(sae.parts.activation).after_step(sae)
    if ema is not None:
        ema.update(sae)
