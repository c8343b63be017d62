"""Each peer's own training step, by the libraries of `benchmarks.peers`; runs in their environment.

If a library's step is a method, it is called (SAELens, dictionary_learning). sparsify's is the body of a loop
over a language model's hooks: here the same functions are called in the same order on given rows. Each
initialises, normalises, schedules and saves as its library does; what all share is in `Job`.

Legend: B rows, D width, N latents, K active latents per row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

NEVER = 1 << 62


@dataclass(frozen=True)
class Job:
    """One training run, as all libraries need it."""

    width: int
    latents: int
    k: int
    rows: int
    """Rows per batch."""
    sample: Tensor
    """Raw rows [S, D], for the constants of a library's normalisation."""
    steps: int = 10_000
    lr: float | None = None
    """Learning rate; None takes the library's default."""
    seed: int = 0
    warmup: int = 0
    """Steps over which lr rises."""
    decay: int = 0
    """Steps at the end over which lr falls, if the library can do that."""
    dead_after: int = NEVER
    """Rows of silence after which a latent is dead."""


class Peer(Protocol):
    """A library's trainer, in the middle of a run."""

    format: str
    """The format of `winnow.sae.formats` that `save` writes."""

    def step(self, rows: Tensor) -> None:
        """Train on raw rows [B, D]."""
        ...

    def save(self, folder: Path) -> None:
        """Write the SAE of raw rows as the library does."""
        ...


class Sparsify:
    """EleutherAI's sparsify, by its default optimiser (schedule-free signum) or by its Adam."""

    format = "sparsify"

    def __init__(self, job: Job, optimizer: str) -> None:
        from schedulefree import ScheduleFreeWrapper  # pyright: ignore[reportMissingImports]
        from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]
        from sparsify.sign_sgd import SignSGD  # pyright: ignore[reportMissingImports]
        from transformers import get_linear_schedule_with_warmup

        torch.manual_seed(job.seed)
        config = SparseCoderConfig(num_latents=job.latents, k=job.k)
        self.coder = SparseCoder(job.width, config, dtype=torch.float32)
        self.job, self.first, self.scheduler = job, True, None
        scale = (job.latents / 2**14) ** 0.5
        if optimizer == "adam":
            self.optimizer: Any = torch.optim.Adam(self.coder.parameters(), lr=job.lr or 2e-4 / scale)
            self.scheduler = get_linear_schedule_with_warmup(self.optimizer, job.warmup, job.steps)
        else:
            signs = SignSGD(self.coder.parameters(), lr=job.lr or 5e-3 / scale)
            self.optimizer = ScheduleFreeWrapper(signs, momentum=0.95)
            self.optimizer.train()
        self.silent = torch.zeros(job.latents, dtype=torch.long)

    def step(self, rows: Tensor) -> None:
        """Train on raw rows [B, D]."""
        # As its trainer does: the bias starts at the first batch's mean.
        if self.first:
            self.coder.b_dec.data = rows.mean(0)
            self.first = False
        self.coder.set_decoder_norm_to_unit_norm()
        out = self.coder(rows, dead_mask=self.silent > self.job.dead_after)
        fired = torch.zeros_like(self.silent, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        (out.fvu + out.auxk_loss / 32).backward()
        self.coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()
        self.silent += len(rows)
        self.silent[fired] = 0

    def save(self, folder: Path) -> None:
        """Write the SAE of raw rows as the library does."""
        # A schedule-free optimiser's result is its averaged weights.
        if self.scheduler is None:
            self.optimizer.eval()
        self.coder.save_to_disk(folder)


class SaeLens:
    """SAELens' TopK or BatchTopK; its sparse mode has no rescaling by decoder norms."""

    format = "saelens"

    def __init__(self, job: Job, *, sparse: bool = False, batch: bool = False) -> None:
        import sae_lens  # pyright: ignore[reportMissingImports]
        from sae_lens.config import SAETrainerConfig  # pyright: ignore[reportMissingImports]
        from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]

        torch.manual_seed(job.seed)
        mode = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False} if sparse else {}
        normalize = "expected_average_only_in"
        name = "BatchTopKTrainingSAE" if batch else "TopKTrainingSAE"
        config = getattr(sae_lens, f"{name}Config")(
            d_in=job.width, d_sae=job.latents, k=job.k, normalize_activations=normalize, **mode
        )
        settings = SAETrainerConfig(
            total_training_samples=job.steps * job.rows,
            train_batch_size_samples=job.rows,
            lr=job.lr or 3e-4,
            lr_end=(job.lr or 3e-4) / 10,
            lr_warm_up_steps=job.warmup,
            lr_decay_steps=job.decay,
            dead_feature_window=min(job.dead_after // job.rows, 1 << 30),
        )
        none: Any = iter(())
        self.trainer = SAETrainer(settings, getattr(sae_lens, name)(config), none)
        batches: Any = iter(job.sample.split(job.rows))
        count = -(-len(job.sample) // job.rows)
        self.trainer.activation_scaler.estimate_scaling_factor(job.width, batches, count)

    def step(self, rows: Tensor) -> None:
        """Train on raw rows [B, D]."""
        self.trainer.step(rows)
        self.trainer.n_training_steps += 1

    def save(self, folder: Path) -> None:
        """Write the SAE of raw rows as the library does."""
        factor = self.trainer.activation_scaler.scaling_factor
        assert factor is not None
        self.trainer.sae.fold_activation_norm_scaling_factor(factor)
        self.trainer.sae.save_inference_model(folder)


class DictionaryLearning:
    """dictionary_learning's TopK or BatchTopK, on rows of mean squared norm 1 as its `trainSAE` feeds it."""

    format = "dictionary_learning"

    def __init__(self, job: Job, *, batch: bool = False) -> None:
        from dictionary_learning.trainers import batch_top_k, top_k  # pyright: ignore[reportMissingImports]

        self.norm = job.sample.square().sum(1).mean().sqrt().item()
        self.trainer = (batch_top_k.BatchTopKTrainer if batch else top_k.TopKTrainer)(
            steps=job.steps,
            activation_dim=job.width,
            dict_size=job.latents,
            k=job.k,
            layer=0,
            lm_name="benchmark",
            lr=job.lr,
            warmup_steps=job.warmup,
            decay_start=job.steps - job.decay if job.decay else None,
            seed=job.seed,
            device="cpu",
        )
        self.trainer.dead_feature_threshold = job.dead_after
        # 1,000 by default: BatchTopK of a shorter run would end without a threshold to encode by.
        self.trainer.threshold_start_step = min(1000, job.steps // 2)
        self.steps = 0

    def step(self, rows: Tensor) -> None:
        """Train on raw rows [B, D]."""
        self.trainer.update(self.steps, rows / self.norm)
        self.steps += 1

    def save(self, folder: Path) -> None:
        """Write the SAE of raw rows as the library does."""
        self.trainer.ae.scale_biases(self.norm)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.trainer.ae.state_dict(), folder / "ae.pt")
        (folder / "config.json").write_text(json.dumps({"trainer": self.trainer.config}))


PEERS: Mapping[str, Callable[[Job], Peer]] = {
    "sparsify": lambda job: Sparsify(job, "signum"),
    "sparsify-adam": lambda job: Sparsify(job, "adam"),
    "sae-lens": SaeLens,
    "sae-lens-sparse": lambda job: SaeLens(job, sparse=True),
    "dictionary-learning": DictionaryLearning,
}
"""Every peer, by its name in the tables."""
BATCH_PEERS: Mapping[str, Callable[[Job], Peer]] = {
    "sae-lens-batchtopk": lambda job: SaeLens(job, batch=True),
    "dictionary-learning-batchtopk": lambda job: DictionaryLearning(job, batch=True),
}
"""Peers that also have BatchTopK."""
