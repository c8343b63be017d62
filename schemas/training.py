"""Training: what to train (spec), where a run stands (checkpoint), what came out (card)."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, model_validator

from winnow.schemas.base import Artefact, Contract, HookName, RelativeKey, Sha256
from winnow.schemas.window import WindowRule

Normalize = Literal["layer", "dataset", "none"]
Activation = Literal["topk", "batchtopk", "relu", "jumprelu"]
ComputeDtype = Literal["float32", "bfloat16"]
MomentsDtype = Literal["float32", "bfloat16", "int8"]


class SaeParts(Contract):
    """What an SAE is made of beside its sizes; the default is the paper's TopK autoencoder."""

    activation: Activation = "topk"
    """`topk`: the K best of each row. `batchtopk`: trained on the best K a row of a whole batch, used with
    one threshold. `relu`: all above 0. `jumprelu`: all above their latent's own threshold."""
    d_out: int | None = Field(default=None, gt=0)
    """Width of a transcoder's target rows; null where the input is reconstructed."""
    target_normalize: Literal["dataset", "none"] | None = None
    """How a transcoder's target rows are normalised; null where there is none."""
    skip: bool = False
    """A transcoder's linear path W_skip [d_out, D] beside the latents."""
    widths: tuple[int, ...] = ()
    """Widths of a crosscoder's hooks, whose rows are joined in this order; empty for a single hook."""
    matryoshka: tuple[int, ...] = ()
    """Sizes of the prefixes of latents that were trained to reconstruct on their own; N is always one."""
    layer_epsilon: float = Field(default=0.0, ge=0)
    """`layer` divides a row by (std + layer_epsilon) sqrt(D - 1), std being its unbiased standard deviation,
    and restores it with std sqrt(D - 1). 0 in Winnow's own SAEs, 1e-5 in those from OpenAI and SAELens."""
    centred: bool = Field(default=False, exclude_if=lambda centred: not centred)
    """With `normalize: none`: each row's mean over D is removed before encoding and added to the output.
    Only in imported SAEs: those that were trained on TransformerLens' centred residual stream."""

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if (self.d_out is None) != (self.target_normalize is None):
            raise ValueError("d_out and target_normalize belong together: a transcoder has both")
        if self.skip and self.d_out is None:
            raise ValueError("skip needs a target: it is a transcoder's part")
        if self.centred and (self.d_out is not None or self.widths):
            raise ValueError("centred is a part of an autoencoder: what a transcoder reads folds into W_enc")
        if self.widths and (len(self.widths) < 2 or min(self.widths) < 1 or self.d_out is not None):
            raise ValueError(f"widths are those of a crosscoder's two hooks or more, got {self.widths}")
        _require_prefixes(self.matryoshka)
        return self


def _require_prefixes(sizes: tuple[int, ...]) -> None:
    if any(size < 1 for size in sizes) or any(a >= b for a, b in pairwise(sizes)):
        raise ValueError(f"matryoshka takes ascending sizes above 0, got {list(sizes)}")


class MeshSpec(Contract):
    """How the processes of a run are laid out; see docs/trainer.md."""

    data: int | None = Field(default=None, gt=0)
    """Ranks that split the batch; it divides `lanes`. Null takes the processes that `latent` leaves."""
    latent: int = Field(default=1, gt=0)
    """Ranks that split the latents."""

    @property
    def size(self) -> int:
        """Processes; the least of them where `data` is open."""
        return (self.data or 1) * self.latent


class TrainSpec(Contract):
    """One SAE and how it is trained (recipe: Gao et al. 2024, arXiv 2406.04093)."""

    out: str = Field(min_length=1)
    """Folder or URI of the run: checkpoints, telemetry, plots and the published SAE."""
    hook: HookName
    """The hook whose rows are reconstructed; the dataset must hold it."""
    latents: int = Field(gt=0)
    """Dictionary size N."""
    k: int = Field(gt=0)
    """Active latents K for each row; with `batchtopk` their mean, with `jumprelu` the mean aimed at, with
    `relu` not used."""
    k_start: int | None = Field(default=None, gt=0)
    """K of the first step; it falls to `k` in eight equal stages over `k_anneal_fraction` of the steps (He
    et al. 2024, arXiv 2410.20526). While more latents are active, more of them find a direction of their own.
    Null is `k` all along."""
    k_anneal_fraction: float = Field(default=0.3, gt=0, lt=1)
    """Share of the steps, at the beginning, on which K is above `k`, where `k_start` is set."""
    normalize: Normalize = "layer"
    """`layer`: each row's mean removed and scaled to unit norm (the paper's); `dataset`: the dataset's
    mean removed and one scalar for a mean squared norm of 1; `none`."""
    activation: Activation = "topk"
    """`topk` (the paper's), `batchtopk` (Bussmann et al. 2024), or the baselines `relu` (with an L1 penalty)
    and `jumprelu` (Rajamanoharan et al. 2024)."""
    target_hook: HookName | None = None
    """Transcoder: the latents read `hook` and reconstruct this hook's rows of the same tokens."""
    target_normalize: Normalize = "dataset"
    """As `normalize`, for `target_hook`. `layer` is refused: at inference nobody knows a target's norm."""
    skip: bool = False
    """Transcoder: add a linear path from the input to the target (Paulo et al. 2025)."""
    with_hooks: tuple[HookName, ...] = ()
    """Crosscoder: more hooks, whose rows are joined to those of `hook`; all are read and reconstructed by
    the same latents, each normalised by its own constants."""
    matryoshka: tuple[int, ...] = ()
    """Ascending numbers of latents: the first so many must reconstruct on their own (Bussmann et al. 2025).
    All `latents` together are always the last of them."""
    encoder_norm: Annotated[float, Field(gt=0)] | Literal["match"] | None = None
    """Norm of the encoder's rows at the start, which point where the decoder's do. `match`: such that the
    first reconstruction is as long as its input (Gao et al. 2024, A.1). Null takes 0.5 for TopK and BatchTopK
    (docs/trainer.md says why) and `match` for transcoders, ReLU and JumpReLU."""
    init_from: str | None = None
    """An SAE, a folder or URI, to begin from in place of random directions: of the same hook's width,
    normalisation and parts. Of one with more latents those that contribute most are kept (docs/trainer.md,
    "Beginning from another SAE")."""
    batch_rows: int = Field(default=2048, gt=0)
    """Rows B of a global batch; divisible by `lanes`."""
    accumulate: int = Field(default=1, gt=0)
    """Micro-batches of a step: the same step as without, up to rounding, in the memory of one of them. It
    divides `batch_rows`, and with `batchtopk` `selection_groups`. May change on resume."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the training split."""
    lanes: int = Field(default=64, gt=0)
    """Lanes G of the stream; divides 64, and `mesh.data` must divide it."""
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
    moments: MomentsDtype = "float32"
    """How Adam's two moments of the matrices are kept: `bfloat16` takes half the memory, `int8`, with a scale
    for each latent, a quarter. Both are rounded at random, by draws that a resume repeats."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest global gradient norm, after the decoder's projection; null never clips."""
    auxk_coefficient: float = Field(default=1 / 32, ge=0)
    """Weight of the AuxK term; 0 turns it off."""
    auxk_k: int | None = Field(default=None, gt=0)
    """Dead latents used by AuxK; null takes the power of two nearest D/2."""
    dead_after_tokens: int | None = Field(default=None, gt=0)
    """A latent silent for this many rows is dead. Null takes a fortieth of the planned rows, or longer until
    the average latent is due to be active 50 times, up to a tenth, and at most 10 M (docs/trainer.md, "When a
    latent is dead")."""
    multi_topk: bool = False
    """Add the loss at 4K, divided by 8."""
    selection_groups: int | None = Field(default=None, gt=0)
    """`batchtopk`: parts of the batch, of whole lanes, in each of which the best K a row are selected,
    whatever the mesh. Null takes 8, or `lanes` where that is less."""
    sparsity_coefficient: float | None = Field(default=None, ge=0)
    """`relu`: weight of the L1 term; null takes 5/sqrt(D) (Anthropic, April 2024, in these units).
    `jumprelu`: weight of (L0/K - 1)^2; null takes 1."""
    sparsity_warmup_fraction: float = Field(default=0.05, ge=0, le=1)
    """`relu`, `jumprelu`: share of the steps over which that weight rises linearly from 0."""
    bandwidth: float = Field(default=0.001, gt=0)
    """`jumprelu`: width, in units of the normalised space, of the kernel that tells the thresholds which
    way to go (Rajamanoharan et al. 2024, section 4)."""
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
    mesh: MeshSpec = MeshSpec()
    """Processes of the run (`torchrun -m winnow.trainer`): data x latent of them. May change on resume."""
    device: str = "auto"
    """`auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:1`."""
    threads: int = Field(default=0, ge=0)
    """CPU threads; 0 takes every core. Bit-identical resume needs the same number."""
    kernels: Literal["auto", "eager", "cpu", "triton"] = "auto"
    """How a step is computed. `auto`: `cpu` on a CPU, `triton` on a GPU; both leave one dense product a
    step. `eager`: the plain step that the others are held to. Another choice moves float noise."""
    compute_dtype: ComputeDtype = "float32"
    """Type in which the large products and gathers of a step take their operands; they are summed in float32,
    and weights, gradients, average and checkpoints stay float32. `bfloat16` is for GPUs, whose tensor cores
    are many times faster in it; a CPU rounds alike and is slower for it."""
    checkpoint_seconds: float = Field(default=60.0, ge=0)
    """Wall-clock between checkpoints; 0 checkpoints after every step."""
    checkpoints_kept: int = Field(default=2, ge=2)
    """Newest checkpoints kept."""
    log_every_steps: int = Field(default=10, gt=0)
    """Steps between telemetry lines."""
    tensorboard: str | None = Field(default=None, min_length=1)
    """Folder of this machine for TensorBoard's event files, one below it for each run; null writes none."""
    wandb: str | None = Field(default=None, min_length=1)
    """Project of Weights & Biases that the telemetry goes to; null sends nothing anywhere."""

    @property
    def stream_seed(self) -> int:
        """Key of the stream's order."""
        return self.seed if self.order_seed is None else self.order_seed

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.k > self.latents:
            raise ValueError(f"k must be at most latents (K <= N): k={self.k}, latents={self.latents}")
        if self.k_start is not None and not self.k <= self.k_start <= self.latents:
            raise ValueError(
                f"k_start must be from k to latents: {self.k_start}, k={self.k}, latents={self.latents}"
            )
        if self.auxk_k is not None and self.auxk_k > self.latents:
            raise ValueError(f"auxk_k must be at most latents: auxk_k={self.auxk_k}, latents={self.latents}")
        if 64 % self.lanes:
            raise ValueError(f"lanes must divide 64, got {self.lanes}")
        if self.batch_rows % self.lanes:
            raise ValueError(
                f"batch_rows must be a multiple of lanes: batch_rows={self.batch_rows}, lanes={self.lanes}"
            )
        if self.lanes % self.groups:
            raise ValueError(
                f"selection_groups must divide lanes: selection_groups={self.groups}, lanes={self.lanes}"
            )
        self._coherent_parts()
        self._coherent_step()
        return self

    def _coherent_step(self) -> None:
        if self.batch_rows % self.accumulate:
            raise ValueError(
                f"accumulate must divide batch_rows: batch_rows={self.batch_rows}, "
                f"accumulate={self.accumulate}"
            )
        if self.accumulate > 1 and self.activation == "batchtopk" and self.groups % self.accumulate:
            raise ValueError(
                "accumulate must divide selection_groups, since batchtopk selects in whole groups: "
                f"selection_groups={self.groups}, accumulate={self.accumulate}"
            )
        dense = self.kernels == "eager" or self.activation in ("relu", "jumprelu")
        fused = {"accumulate": self.accumulate > 1, "compute_dtype": self.compute_dtype != "float32"}
        fused["moments"] = self.moments != "float32"
        for field, wanted in fused.items():
            if dense and wanted:
                raise ValueError(
                    f"{field}: {getattr(self, field)} needs the fused step, which `kernels: eager` and the "
                    "activations relu and jumprelu have not"
                )

    def _coherent_parts(self) -> None:
        if self.target_hook is not None and self.target_normalize == "layer":
            raise ValueError("target_normalize: layer is refused, a target's norm is unknown at inference")
        if self.target_hook == self.hook:
            raise ValueError("target_hook is hook itself: leave it out for an autoencoder")
        if self.skip and self.target_hook is None:
            raise ValueError("skip needs target_hook: it is a transcoder's part")
        if self.with_hooks and self.target_hook is not None:
            raise ValueError("with_hooks and target_hook: a crosscoder reconstructs its own hooks")
        if self.with_hooks and self.normalize == "layer":
            raise ValueError("a crosscoder needs normalize: dataset or none, its hooks are targets too")
        if len({self.hook, *self.with_hooks}) != 1 + len(self.with_hooks):
            raise ValueError(f"with_hooks names a hook twice: {self.hook}, {', '.join(self.with_hooks)}")
        _require_prefixes(self.matryoshka)
        if self.matryoshka and self.matryoshka[-1] > self.latents:
            raise ValueError(
                f"matryoshka sizes are at most latents: {self.matryoshka[-1]}, latents={self.latents}"
            )
        if self.multi_topk and (self.activation != "topk" or self.matryoshka):
            raise ValueError("multi_topk goes with activation: topk, and not with matryoshka")

    @property
    def first_encoder_norm(self) -> float | None:
        """`encoder_norm`, resolved; None is `match`."""
        if self.encoder_norm is not None:
            return None if self.encoder_norm == "match" else self.encoder_norm
        return 0.5 if self.target_hook is None and self.activation in ("topk", "batchtopk") else None

    @property
    def groups(self) -> int:
        """`selection_groups`, resolved."""
        return self.selection_groups if self.selection_groups is not None else min(8, self.lanes)

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Latents of each prefix that reconstructs on its own; the last is N."""
        return (*(size for size in self.matryoshka if size < self.latents), self.latents)

    @property
    def input_hooks(self) -> tuple[str, ...]:
        """The hooks whose rows, joined, are the input."""
        return (self.hook, *self.with_hooks)

    @property
    def output_hooks(self) -> tuple[str, ...]:
        """The hooks whose rows, joined, are reconstructed."""
        return self.input_hooks if self.target_hook is None else (self.target_hook,)

    @property
    def read_hooks(self) -> tuple[str, ...]:
        """Every hook that is read."""
        return self.input_hooks if self.target_hook is None else (self.hook, self.target_hook)

    def parts(self, widths: dict[str, int]) -> SaeParts:
        """What the SAE is made of, given each hook's width."""
        target = self.target_hook
        return SaeParts(
            activation=self.activation,
            d_out=None if target is None else widths[target],
            target_normalize=cast("Literal['dataset', 'none']", self.target_normalize) if target else None,
            skip=self.skip,
            widths=tuple(widths[hook] for hook in self.input_hooks) if self.with_hooks else (),
            matryoshka=self.matryoshka,
        )


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


class CheckpointRows(Contract):
    """A file of a checkpoint that holds some latents' rows of every tensor that has latents."""

    file: RelativeKey
    first: int = Field(ge=0)
    """Its first latent."""
    stop: int = Field(gt=0)
    """The latent after its last."""


class CheckpointIndex(Artefact):
    """`checkpoints/<step>/index.json`: create-only, written after the state it names is durable."""

    kind: Literal["winnow.checkpoint"] = "winnow.checkpoint"
    version: str = "1.1"
    """1.1 put the latents' rows into files of their own; 1.0 had one file."""
    step: int = Field(ge=0)
    """Steps finished."""
    spec: TrainSpec
    identity: SaeIdentity
    stream: StreamState
    files: dict[RelativeKey, Sha256]
    """Safetensors files beside the index and their digests."""
    rows: tuple[CheckpointRows, ...] = ()
    """Which of them hold which latents; together all of them, once. The rest of the state is in one file."""
    world: int = Field(default=1, gt=0)
    """Processes that wrote it; any number reads it."""
    threads: int
    device: str
    tokens: int
    """Rows trained on so far."""
    created: str


class SaeCard(Artefact):
    """`sae.json`: everything needed to use `sae.safetensors`, and where it came from."""

    kind: Literal["winnow.sae"] = "winnow.sae"
    version: str = "1.1"
    """1.1 added the parts; 1.0 knew one, TopK, and named it `architecture`."""
    d_model: int = Field(gt=0)
    """Width D of the input; of a crosscoder, the sum over its hooks."""
    latents: int = Field(gt=0)
    k: int = Field(gt=0)
    hook: HookName
    """Where the input is read; of a crosscoder, the first hook."""
    with_hooks: tuple[HookName, ...] = ()
    """A crosscoder's other hooks, in the order of their rows."""
    target_hook: HookName | None = None
    """A transcoder's target."""
    normalize: Normalize
    parts: SaeParts = SaeParts()
    weights: Literal["raw", "ema"]
    """Which of the two was better on held-out rows and is exported."""
    weights_sha256: Sha256
    """Digest of `sae.safetensors`."""
    identity: SaeIdentity | None = None
    window: WindowRule | None = Field(default=None, exclude_if=lambda rule: rule is None)
    """How the windows began that it was trained on; null where that was not written down."""
    spec: TrainSpec | None = None
    metrics: dict[str, float] = {}
    """Held-out figures by definition id, such as `fvu_normalised.raw`."""
    notes: tuple[str, ...] = Field(default=(), exclude_if=lambda notes: not notes)
    """Of an import: what the other library's files said that the SAE cannot hold, a sentence each."""

    @model_validator(mode="before")
    @classmethod
    def _from_1_0(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        fields = cast("dict[str, Any]", raw)
        if fields.get("version") == "1.0" and fields.get("architecture") == "topk":
            return {key: value for key, value in fields.items() if key != "architecture"}
        return fields

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if (self.target_hook is None) != (self.parts.d_out is None):
            raise ValueError("target_hook and parts.d_out belong together: a transcoder has both")
        widths = self.parts.widths
        if (len(widths) or 1) != 1 + len(self.with_hooks) or (widths and sum(widths) != self.d_model):
            raise ValueError(f"parts.widths {widths} do not fit the hooks, or d_model {self.d_model}")
        return self

    @property
    def input_hooks(self) -> tuple[str, ...]:
        """The hooks whose rows, joined, are the input."""
        return (self.hook, *self.with_hooks)

    @property
    def output_hooks(self) -> tuple[str, ...]:
        """The hooks whose rows, joined, are reconstructed."""
        return self.input_hooks if self.target_hook is None else (self.target_hook,)
