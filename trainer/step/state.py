"""The state of a run: everything that changes while training."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from winnow.sae.model import Sae
from winnow.trainer.kernels import Backend
from winnow.trainer.mesh.shard import Shard
from winnow.trainer.mesh.world import World
from winnow.trainer.step.dead import DeadCounter
from winnow.trainer.step.optim import Ema, HostSteps, ema_beta, make_adam
from winnow.trainer.step.recipe import Recipe, choose_kernels
from winnow.trainer.step.rounded import RoundedWeights


@dataclass
class Counts:
    """Numbers a run carries along; all of them are checkpointed."""

    step: int = 0
    """Steps finished."""
    tokens: int = 0
    """Rows of weight above 0 trained on."""
    tokens_before_last_epoch: int = 0
    """`tokens` when the last epoch began."""
    auxk_steps: int = 0
    """Steps on which AuxK was active."""
    auxk_nonfinite: int = 0
    """Steps on which AuxK was not finite and counted as 0."""
    seconds: float = 0.0
    """Wall-clock spent in steps, waiting for data included."""
    seconds_waiting: float = 0.0
    """The part of `seconds` spent waiting for data."""


class Run:
    """Everything that changes while training: weights, Adam, moving average, dead counts, counts.

    Args:
        sae: An initialised SAE; on a mesh, of this rank's latents.
        recipe: How it is trained.
        loss_constant: From `winnow.sae.init.initialise`.
        world: The mesh; one process if not given.
        kernels: The backend; None chooses that of the spec and the device.
    """

    def __init__(
        self,
        sae: Sae,
        recipe: Recipe,
        loss_constant: float,
        world: World | None = None,
        kernels: Backend | None = None,
    ) -> None:
        # measured once, at the start: from batch to batch it would change the scale of the loss
        self.recipe, self.loss_constant = recipe, loss_constant
        self.shard = Shard(sae, world or World(), recipe.spec.latents)
        self.kernels: Backend = kernels or choose_kernels(recipe.spec, sae.parts, self.device)
        self.adam = make_adam(sae, recipe.spec)
        self.adam_steps = HostSteps()
        self.ema = Ema(sae, ema_beta(recipe.spec, recipe.steps)) if recipe.spec.ema else None
        self.dead = DeadCounter(sae.latents, self.device)
        self.counts = Counts()
        self.rounded = RoundedWeights()
        self.source: Sae | None = None
        """The SAE that a new run starts from, if any."""

    @property
    def sae(self) -> Sae:
        """This rank's latents."""
        return self.shard.sae

    @property
    def parts(self) -> dict[str, Run]:
        """Prefix of the names in a checkpoint -> a run: itself, where a set has one per layer."""
        return {"": self}

    @property
    def latents(self) -> int:
        """Latents of all shards."""
        return self.shard.latents

    @property
    def world(self) -> World:
        """The mesh."""
        return self.shard.world

    @property
    def batches(self) -> bool:
        """Whether rows are selected together, and it matters which group of lanes they come from."""
        return self.sae.parts.traits.selects == "batch"

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.sae.W_enc.device

    @property
    def dead_share_of_last_epoch(self) -> float:
        """Share of the latents never active over the last epoch so far; on a mesh, a collective."""
        # at least 1: a latent is silent for 0 rows at any time
        rows = max(1, self.counts.tokens - self.counts.tokens_before_last_epoch)
        # every data rank has the same counts, so only shards are summed
        silent = self.world.latent.sum(torch.tensor(len(self.dead.silent(rows))))
        return int(silent) / self.recipe.spec.latents
