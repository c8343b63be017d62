"""A training spec resolved against a dataset: what every step of a run has in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from winnow.common.reporter import say
from winnow.sae.activations import activation_of
from winnow.schemas.errors import ConfigError
from winnow.schemas.training import SaeParts, TrainSpec
from winnow.trainer.kernels import Backend, choose

# the paper's, which exceeds the length of a short run (Gao et al. 2024)
LONGEST_DEAD_AFTER = 10_000_000
"""Most rows of silence before a latent is dead, unless the spec says."""

K_STAGES = 8
"""Stages in which K falls from `k_start` to `k`."""


@dataclass(frozen=True)
class Recipe:
    """The spec, resolved against a dataset: everything a step needs and no step changes."""

    spec: TrainSpec
    steps: int
    """Steps of the whole run."""
    steps_per_epoch: int
    k_aux: int
    dead_after: int
    """Rows of silence after which a latent is dead."""
    sparsity: float = 0.0
    """Weight of the sparsity term of activations that select nothing."""

    @classmethod
    def resolve(cls, spec: TrainSpec, d_model: int, steps_per_epoch: int) -> Recipe:
        """Fill the spec's open fields for rows of width D."""
        # a product such as 0.29 * 100 may come out just below the whole number
        steps = int(spec.epochs * steps_per_epoch + 1e-9)
        planned = steps * spec.batch_rows
        return cls(
            spec,
            steps,
            steps_per_epoch,
            k_aux=spec.auxk_k if spec.auxk_k is not None else power_of_two_near(d_model / 2),
            dead_after=spec.dead_after_tokens
            if spec.dead_after_tokens is not None
            else dead_after_rows(planned, spec.latents, spec.k),
            sparsity=spec.sparsity_coefficient
            if spec.sparsity_coefficient is not None
            else activation_of(spec.activation).default_sparsity(d_model),
        )

    def sparsity_at(self, step: int) -> float:
        """`sparsity`, rising linearly from 0 over the first steps."""
        warmup = self.spec.sparsity_warmup_fraction * self.steps
        return self.sparsity * (min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0)

    def k_at(self, step: int) -> int:
        """Active latents K per row in step `step` (from 0); falls in `K_STAGES` stages."""
        if self.spec.k_start is None:
            return self.spec.k
        stages = int(K_STAGES * step / (self.spec.k_anneal_fraction * self.steps))
        extra = (self.spec.k_start - self.spec.k) * max(0, K_STAGES - stages)
        # rounded up, so that no stage before the last falls to `k`
        return self.spec.k + -(-extra // K_STAGES)

    @property
    def last_epoch_start(self) -> int:
        """The first step of the last `steps_per_epoch` steps."""
        return max(0, self.steps - self.steps_per_epoch)


def choose_kernels(spec: TrainSpec, parts: SaeParts, device: torch.device) -> Backend:
    """The backend of a run; `auto` takes the eager step if a variant has no other, and says so.

    Raises:
        ConfigError: A backend was asked for that this variant does not have; see also `dispatch.choose`.
    """
    if parts.traits.selects or spec.kernels == "eager":
        return choose(spec.kernels, device)
    if spec.kernels != "auto":
        raise ConfigError(
            f"kernels: {spec.kernels}",
            expected=f"eager or auto, activation {parts.activation} has no other step",
            got=spec.kernels,
            fix="Set kernels: auto",
        )
    say(f"kernels: eager, since activation {parts.activation} has no other step")
    return choose("eager", device)


def dead_after_rows(planned: int, latents: int, k: int) -> int:
    """Rows of silence after which a latent is dead, unless the spec says.

    A fortieth of the run, or longer until the average latent is due to be active 50 times, up to a tenth.

    Args:
        planned: Rows of the whole run.
        latents: N.
        k: K.
    """
    # with a tenth 0.93 % of the latents of a run of 130 steps ended silent, with a fortieth none, and FVU was
    # no worse (docs/trainer.md): detecting them early costs nothing
    wanted = max(planned // 40, min(planned // 10, 50 * latents // k))
    return max(1, min(LONGEST_DEAD_AFTER, wanted))


def power_of_two_near(size: float) -> int:
    """The power of two nearest `size` on a log scale, at least 1."""
    return 1 << max(0, round(torch.tensor(size, dtype=torch.float64).log2().item()))
