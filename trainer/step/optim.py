"""The optimiser's parts: learning rate, Adam, the decoder's constraint, clipping, moving average.

Legend: D d_model, N latents. The order inside a step (`trainer/step/train.py`): gradients, projection of the
decoder's, clipping, Adam, renormalisation of the decoder's rows, moving average.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from winnow.sae.model import Sae
from winnow.schemas.training import TrainSpec


def peak_lr(spec: TrainSpec) -> float:
    """The spec's learning rate, or lr_constant / sqrt(N) (Gao et al., section A.3)."""
    return spec.lr if spec.lr is not None else spec.lr_constant / spec.latents**0.5


def lr_at(step: int, steps: int, spec: TrainSpec) -> float:
    """Learning rate of step `step` (from 0) of `steps`.

    Linear warm-up over the first `warmup_fraction` of the steps, then flat, then linear decay over the
    last `decay_fraction`: the step after the last would have rate 0.
    """
    warmup, decay = spec.warmup_fraction * steps, spec.decay_fraction * steps
    # + 1, so that the first step does not have rate 0
    rising = (step + 1) / warmup if warmup > 0 else 1.0
    falling = (steps - step) / decay if decay > 0 else 1.0
    return peak_lr(spec) * min(1.0, rising, falling)


def make_adam(sae: Sae, spec: TrainSpec) -> torch.optim.Adam:
    """Adam over every trained tensor."""
    parameters = [getattr(sae, name) for name in sae.parameter_names]
    # fused is deterministic and saves passes over memory
    return torch.optim.Adam(
        parameters, lr=peak_lr(spec), betas=spec.adam_betas, eps=spec.adam_eps, fused=True
    )


class HostSteps:
    """Adam's counts of steps, which are on the device, as long as the host is the one that writes them."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Tensor, int]] = {}

    def of(self, name: str, step: Tensor) -> int:
        """A parameter's steps so far; asks the device unless `step` [] is as it was told."""
        told, number = self._known.get(name, (None, 0))
        return number if told is step and not step._version else int(step.item())

    def tell(self, name: str, step: Tensor, number: int) -> None:
        """A new tensor, of version 0, holds this number."""
        self._known[name] = (step, number)


@torch.no_grad()
def project_decoder_gradient(sae: Sae) -> None:
    """Remove from each decoder row's gradient the part parallel to the (unit) row."""
    if sae.W_dec.grad is not None:
        # rows are unit, so this is not divided by their squared norm
        along = (sae.W_dec.grad * sae.W_dec).sum(dim=1, keepdim=True)
        sae.W_dec.grad.addcmul_(sae.W_dec, along, value=-1.0)


@torch.no_grad()
def renormalise_decoder(W_dec: Tensor) -> None:
    """Scale each decoder row [N, D] to unit norm, in place."""
    # `F.normalize` into the same memory: two passes fewer
    W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True).clamp_min_(1e-12))


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], largest: float | None, norm: float | None = None) -> float:
    """Scale all gradients so that their joint norm is at most `largest`; give the norm before.

    `norm` is the joint norm, if these are not all gradients: on a mesh.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads).item() if norm is None else norm
    if largest is not None and norm > largest:
        for grad in grads:
            grad.mul_(largest / norm)
    return norm


class Ema:
    """Exponential moving average of the weights, bias-corrected.

    Args:
        sae: The SAE whose weights are followed.
        beta: Share of the average kept at each step, in [0, 1).
    """

    def __init__(self, sae: Sae, beta: float) -> None:
        self.beta = beta
        self.steps = 0
        self.sums = {name: torch.zeros_like(getattr(sae, name)) for name in sae.parameter_names}
        """(1 - beta) * sum of beta^age * weights, without the correction."""

    @torch.no_grad()
    def update(self, sae: Sae) -> None:
        """Take in the weights after a step."""
        self.steps += 1
        for name, total in self.sums.items():
            total.lerp_(getattr(sae, name).detach(), 1 - self.beta)

    def weights(self) -> dict[str, Tensor]:
        """The corrected average by parameter name, decoder rows renormalised; after one step or more."""
        # the sums began at 0; and an average of unit rows is shorter than 1
        correction = 1 - self.beta**self.steps
        averages = {name: total / correction for name, total in self.sums.items()}
        renormalise_decoder(averages["W_dec"])
        return averages


def ema_beta(spec: TrainSpec, steps: int) -> float:
    """The spec's beta, or min(0.999, 1 - 20/steps), at least 0."""
    # a memory of a twentieth of the run: 0.999 cost 0.06 of FVU on a run of 700 steps
    return spec.ema_beta if spec.ema_beta is not None else max(0.0, min(0.999, 1 - 20 / steps))
