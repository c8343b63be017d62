"""Training: what to train (spec), where a run stands (checkpoint), what came out (card)."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from schemas.base import Artefact, Contract, HookName, RelativeKey, Sha256

Normalize = Literal["layer", "dataset", "none"]


class TrainSpec(Contract):
    """One SAE and how it is trained (recipe: Gao et al. 2024, arXiv 2406.04093)."""

    out: str = Field(min_length=1)
    """Folder or URI of the run: checkpoints, telemetry, plots and the published SAE."""
    hook: HookName
    """The hook whose rows are reconstructed; the dataset must hold it."""
    latents: int = Field(gt=0)
    """Dictionary size N."""
    k: int = Field(gt=0)
    """Active latents K for each row."""
    normalize: Normalize = "layer"
    """`layer`: each row's mean removed and scaled to unit norm (the paper's); `dataset`: the dataset's
    mean removed and one scalar for a mean squared norm of 1; `none`."""
    batch_rows: int = Field(default=2048, gt=0)
    """Rows B of a global batch; divisible by `lanes`."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the training split."""
    lanes: int = Field(default=64, gt=0)
    """Lanes G of the stream; divides 64, and the world size must divide it."""
    group_units: int | None = Field(default=None, gt=0)
    """Units U shuffled together; null takes as many as `group_bytes` holds."""
    group_bytes: int = Field(default=2 * 2**30, gt=0)
    """Budget for one group in memory over all ranks, in bytes; twice that with double buffering."""
    lr: float | None = Field(default=None, gt=0)
    """Adam's learning rate; null takes lr_constant / sqrt(N)."""
    lr_constant: float = Field(default=0.064, gt=0)
    """0.064 for short runs (1e-3 at N = 4,096), 0.018 for long ones (1e-4 at 32,768)."""
    warmup_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps over which lr rises linearly from 0."""
    decay_fraction: float = Field(default=0.2, ge=0, le=1)
    """Share of the steps, at the end, over which lr falls linearly to 0."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = Field(default=6.25e-10, gt=0)
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest global gradient norm, after the decoder's projection; null never clips."""
    auxk_coefficient: float = Field(default=1 / 32, ge=0)
    """Weight of the AuxK term; 0 turns it off."""
    auxk_k: int | None = Field(default=None, gt=0)
    """Dead latents used by AuxK; null takes the power of two nearest D/2."""
    dead_after_tokens: int | None = Field(default=None, gt=0)
    """A latent silent for this many rows is dead; null takes min(10 M, planned rows / 10)."""
    multi_topk: bool = False
    """Add the loss at 4K, divided by 8."""
    ema: bool = True
    """Keep an exponential moving average of the weights and export it if it is better."""
    ema_beta: float | None = Field(default=None, ge=0, lt=1)
    """Null takes min(0.999, 1 - 20/steps)."""
    sample_rows: int = Field(default=8192, gt=0)
    """Rows of the initial sample: geometric median, loss constants, encoder scale."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Weights, and the stream's order where `order_seed` is null."""
    order_seed: int | None = Field(default=None, ge=0, lt=2**63)
    """The stream's order. SAEs that differ in `seed` alone share one read of the store if this is set."""
    follow: bool = False
    """Train while the dataset is harvested: wait for each group of units, and see the same batches."""
    follow_seconds: float = Field(default=600.0, gt=0)
    """A follower gives up after this long without the plan, or without any unit being committed."""
    device: str = "auto"
    """`auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:1`."""
    threads: int = Field(default=0, ge=0)
    """CPU threads; 0 takes every core. Bit-identical resume needs the same number."""
    kernels: Literal["auto", "eager", "cpu", "triton"] = "auto"
    """How a step is computed. `auto`: `cpu` on a CPU, `triton` on a GPU; both leave one dense product a
    step. `eager`: the plain step that the others are held to. Another choice moves float noise."""
    checkpoint_seconds: float = Field(default=60.0, ge=0)
    """Wall-clock between checkpoints; 0 checkpoints after every step."""
    checkpoints_kept: int = Field(default=2, ge=2)
    """Newest checkpoints kept."""
    log_every_steps: int = Field(default=10, gt=0)
    """Steps between telemetry lines."""

    @property
    def stream_seed(self) -> int:
        """Key of the stream's order."""
        return self.seed if self.order_seed is None else self.order_seed

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.k > self.latents:
            raise ValueError(f"k must be at most latents (K <= N): k={self.k}, latents={self.latents}")
        if 64 % self.lanes:
            raise ValueError(f"lanes must divide 64, got {self.lanes}")
        if self.batch_rows % self.lanes:
            raise ValueError(
                f"batch_rows must be a multiple of lanes: batch_rows={self.batch_rows}, lanes={self.lanes}"
            )
        return self


class StreamState(Contract):
    """Where a stream stands: integers only, O(1) to resume."""

    plan_fingerprint: Sha256
    split: str
    hooks: tuple[HookName, ...]
    algorithm: str
    """Name and version of the order, such as `lanes.v1`."""
    seed: int
    lanes: int
    group_units: int
    batch_rows: int
    step: int
    """The next step, counted over all epochs."""


class SaeIdentity(Contract):
    """What an SAE's weights belong to."""

    plan_fingerprint: Sha256
    dataset_sha256: Sha256 | None
    """Null where the dataset was not sealed yet: the plan's fingerprint alone says what was harvested."""
    subject_model: str
    subject_weights_sha256: Sha256


class CheckpointIndex(Artefact):
    """`checkpoints/<step>/index.json`: create-only, written after the state it names is durable."""

    kind: Literal["winnow.checkpoint"] = "winnow.checkpoint"
    step: int = Field(ge=0)
    """Steps finished."""
    spec: TrainSpec
    identity: SaeIdentity
    stream: StreamState
    files: dict[RelativeKey, Sha256]
    """Safetensors files beside the index and their digests."""
    world: int = Field(default=1, gt=0)
    threads: int
    device: str
    tokens: int
    """Rows trained on so far."""
    created: str


class SaeCard(Artefact):
    """`sae.json`: everything needed to use `sae.safetensors`, and where it came from."""

    kind: Literal["winnow.sae"] = "winnow.sae"
    architecture: Literal["topk"] = "topk"
    d_model: int = Field(gt=0)
    latents: int = Field(gt=0)
    k: int = Field(gt=0)
    hook: HookName
    normalize: Normalize
    weights: Literal["raw", "ema"]
    """Which of the two was better on held-out rows and is exported."""
    weights_sha256: Sha256
    """Digest of `sae.safetensors`."""
    identity: SaeIdentity | None = None
    spec: TrainSpec | None = None
    metrics: dict[str, float] = {}
    """Held-out figures by definition id, such as `fvu_normalised.raw`."""
