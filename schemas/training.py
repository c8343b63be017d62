"""Training: what to train (spec), the state of a run (checkpoint), the result (card)."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, model_validator

from winnow.schemas.activations import Activation, Traits, traits_of
from winnow.schemas.base import Artefact, Contract, ReadHook, RootName, Sha256
from winnow.schemas.derived import DeriveRule
from winnow.schemas.layers import WRITES, SetSpec, layer_folder
from winnow.schemas.readings import RowsSpec
from winnow.schemas.window import WindowRule

Normalize = Literal["layer", "dataset", "none"]
ComputeDtype = Literal["float32", "bfloat16"]
Float32Products = Literal["ieee", "bounded"]
MomentsDtype = Literal["float32", "bfloat16", "int8"]


class SaeParts(Contract):
    """What an SAE is made of besides its sizes. The default is the TopK autoencoder of Gao et al. 2024."""

    activation: Activation = "topk"
    """Which latents are active. `topk`: the K largest of each row. `batchtopk`: in training the largest K per
    row on average over a batch, otherwise all above one threshold. `relu`: all above 0. `jumprelu`: all above
    their own threshold."""
    d_out: int | None = Field(default=None, gt=0)
    """Of a transcoder: width of the target's rows. Null if the SAE reconstructs its input."""
    target_widths: tuple[int, ...] = Field(default=(), exclude_if=lambda widths: not widths)
    """Of a layer of a cross-layer transcoder with several targets: their widths, which add up to `d_out`.
    Their rows are concatenated in this order, each normalised by its own constants. Empty for one target."""
    target_normalize: Literal["dataset", "none"] | None = None
    """Of a transcoder: how the target's rows are normalised, as in `TrainSpec.normalize`. Null otherwise."""
    skip: bool = False
    """Of a transcoder: whether it has a linear path W_skip [d_out, D] besides the latents."""
    widths: tuple[int, ...] = ()
    """Of a crosscoder: widths of its hooks, whose rows are concatenated in this order. Empty for a single
    hook."""
    matryoshka: tuple[int, ...] = ()
    """Numbers of leading latents that were trained to reconstruct without the others; N is always one of
    them. Empty if there are no others."""
    layer_epsilon: float = Field(default=0.0, ge=0)
    """With `normalize: layer`, a row is divided by (std + layer_epsilon) sqrt(D - 1), where std is its
    unbiased standard deviation, and restored with std sqrt(D - 1). 0 in Winnow's own SAEs, 1e-5 in those of
    OpenAI and SAELens."""
    # Left out of the JSON while false: cards written before it existed keep their bytes.
    centred: bool = Field(default=False, exclude_if=lambda centred: not centred)
    """With `normalize: none`: whether each row's mean over D is removed before encoding and added to the
    output. True only in imported SAEs that were trained on TransformerLens' centred residual stream."""

    @property
    def traits(self) -> Traits:
        """What the activation needs of an SAE."""
        return traits_of(self.activation)

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if (self.d_out is None) != (self.target_normalize is None):
            raise ValueError("d_out and target_normalize belong together: a transcoder has both")
        if self.skip and self.d_out is None:
            raise ValueError("skip needs a target: it is a transcoder's part")
        # A transcoder's output is another hook's row, to which the input's mean does not belong.
        if self.centred and (self.d_out is not None or self.widths):
            raise ValueError("centred is a part of an autoencoder: what a transcoder reads folds into W_enc")
        if self.widths and (len(self.widths) < 2 or min(self.widths) < 1 or self.d_out is not None):
            raise ValueError(f"widths belong to a crosscoder, which has two hooks or more: got {self.widths}")
        several = self.target_widths
        if several and (len(several) < 2 or min(several) < 1 or sum(several) != self.d_out):
            raise ValueError(f"target_widths are two or more and add up to d_out, got {several}")
        _require_prefixes(self.matryoshka)
        return self


def _require_prefixes(sizes: tuple[int, ...]) -> None:
    if any(size < 1 for size in sizes) or any(a >= b for a, b in pairwise(sizes)):
        raise ValueError(f"matryoshka takes ascending sizes above 0, got {list(sizes)}")


class MeshSpec(Contract):
    """How the processes of a run are arranged: `data` x `latent` ranks (docs/trainer.md, "Parallel")."""

    data: int | None = Field(default=None, gt=0)
    """Ranks that split the batch. It must divide `lanes`, because a rank owns whole lanes. Null, the default,
    takes the processes that `latent` leaves."""
    latent: int = Field(default=1, gt=0)
    """Ranks that split the latents: weights, Adam's state, average and dead counts. 1, the default, keeps
    them whole."""

    @property
    def size(self) -> int:
        """Number of processes; the smallest possible if `data` is null."""
        return (self.data or 1) * self.latent


class TrainSpec(Contract):
    """One SAE and how it is trained.

    Where no other source is named, the recipe is that of Gao et al. 2024 (arXiv 2406.04093).
    """

    out: str = Field(min_length=1)
    """Folder, from the working directory, or URI of the run: checkpoints, telemetry, plots, published SAE."""
    roots: dict[RootName, str] | None = Field(default=None, exclude_if=lambda roots: roots is None)
    """Several datasets in the place of the config's `root`, by name: `{base: URI, chat: URI}`. Their rows
    must be those of the same tokens (`plan.tokens_from`). Hooks are then `base/resid_post.9` and
    `chat/resid_post.9`. Null, the default, reads `root`."""
    hook: ReadHook
    """The hook whose rows are read, and reconstructed unless there is a `target_hook`. The dataset must have
    it."""
    latents: int = Field(gt=0)
    """Number of latents N, the size of the dictionary."""
    k: int = Field(gt=0)
    """Active latents K per row. With `batchtopk` it is their mean, with `jumprelu` the mean that training
    aims at; `relu` does not use it."""
    k_start: int | None = Field(default=None, gt=0)
    """K of the first step. It falls to `k` in eight equal stages over `k_anneal_fraction` of the steps (He et
    al. 2024, arXiv 2410.20526): while more latents are active, more of them find a direction of their own.
    Null, the default, is `k` throughout, because annealing was not ahead on known directions and worse on
    real ones."""
    k_anneal_fraction: float = Field(default=0.3, gt=0, lt=1)
    """Share of the steps, from the first, on which K is above `k` if `k_start` is set."""
    normalize: Normalize = "layer"
    """How rows are normalised. `layer`: each row's mean is removed and the row scaled to unit norm, as in Gao
    et al. `dataset`: the dataset's mean is removed, and one scalar makes the mean squared norm 1. `none`: not
    at all."""
    activation: Activation = "topk"
    """Which latents are active: `topk` (Gao et al.), `batchtopk` (Bussmann et al. 2024), or the baselines
    `relu` (with an L1 penalty) and `jumprelu` (Rajamanoharan et al. 2024). See `SaeParts.activation`."""
    rows: RowsSpec = Field(default=RowsSpec(), exclude_if=lambda rows: rows.everything)
    """Rows that are read, chosen by the labels of their tokens: `{roles: [assistant], special: false}`
    (`RowsSpec`). Every batch is filled with chosen rows. Empty, the default, reads all rows."""
    target_hook: ReadHook | None = None
    """Makes a transcoder: the latents read `hook` and reconstruct this hook's rows of the same tokens."""
    # Not `layer`, the default of `normalize`: at inference the target's norm is unknown.
    target_normalize: Normalize = "dataset"
    """How the rows of `target_hook` are normalised: `dataset` or `none`. `layer` is refused, because the
    target's norm is unknown at inference."""
    skip: bool = False
    """Of a transcoder: add a linear path from the input to the target (Paulo et al. 2025)."""
    with_hooks: tuple[ReadHook, ...] = ()
    """Makes a crosscoder: further hooks, whose rows are concatenated with those of `hook`. The same latents
    read and reconstruct all of them, each normalised by its own constants."""
    set: SetSpec | None = Field(default=None, exclude_if=lambda of: of is None)
    """Makes a transcoder set, one dictionary of `latents` and `k` for every layer of a range, trained
    together from one read: `{layers: all, cross: false, reads: resid_mid}` (`SetSpec`). `hook` and
    `target_hook` are then left out, since they follow from it."""
    matryoshka: tuple[int, ...] = ()
    """Ascending numbers of latents: for each, that many leading latents must also reconstruct without the
    others (Bussmann et al. 2025). All `latents` together are always the last of them. Empty trains only
    those."""
    encoder_norm: Annotated[float, Field(gt=0)] | Literal["match"] | None = None
    """Norm of the encoder's rows at the start; they point in the same directions as the decoder's. `match`:
    such that the first reconstruction is as long as its input (Gao et al., A.1). Null, the default, takes
    `match` for ReLU and JumpReLU, and for TopK and BatchTopK 0.5, or 0.1 if they are transcoders
    (docs/trainer.md)."""
    init_from: str | None = None
    """Folder or URI of an SAE to begin from instead of random directions. It must have the same width,
    normalisation and parts. If it has more latents, those that contribute most are kept (docs/trainer.md,
    "Beginning from another SAE")."""
    batch_rows: int = Field(default=2048, gt=0)
    """Rows B of a global batch; a multiple of `lanes`."""
    accumulate: int = Field(default=1, gt=0)
    """Micro-batches per step. The step is the same up to rounding, in the memory of one micro-batch. It must
    divide `batch_rows`, and with `batchtopk` also `selection_groups`. It may change on resume."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the training split."""
    lanes: int = Field(default=64, gt=0)
    """Lanes G of the stream: the largest number of data ranks that see the same batches. It must divide 64,
    the slices of a shard, and `mesh.data` must divide it."""
    group_units: int | None = Field(default=None, gt=0)
    """Units U that are shuffled together. Null, the default, takes as many as `group_bytes` allows."""
    group_bytes: int = Field(default=2 * 2**30, gt=0)
    """Memory for one group over all ranks, in bytes. Twice as much is used, since the next group is read
    while one is consumed."""
    lr: float | None = Field(default=None, gt=0)
    """Adam's learning rate. Null, the default, takes lr_constant / sqrt(N)."""
    lr_constant: float = Field(default=0.064, gt=0)
    """Constant of that rule: 0.064 for short runs (1e-3 at N = 4,096), 0.018 for long ones (1e-4 at N =
    32,768)."""
    warmup_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps, from the first, over which the learning rate rises linearly from 0."""
    decay_fraction: float = Field(default=0.2, ge=0, le=1)
    """Share of the steps, up to the last, over which the learning rate falls linearly to 0."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of the first and the second moment."""
    adam_eps: float = Field(default=6.25e-10, gt=0)
    """Adam's epsilon, that of Gao et al."""
    moments: MomentsDtype = "float32"
    """Type in which Adam's two moments of the matrices are stored. `bfloat16` takes half the memory, `int8`,
    with a scale per latent, a quarter. Both are rounded at random, since the nearest value would freeze a
    slowly falling moment; a resumed run repeats the draws."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest norm of the whole gradient, after the decoder's projection. Null never clips."""
    auxk_coefficient: float = Field(default=1 / 32, ge=0)
    """Weight of the AuxK loss, by which dead latents are revived; 0 turns it off."""
    auxk_k: int | None = Field(default=None, gt=0)
    """Dead latents per row that the AuxK loss uses. Null, the default, takes the power of two nearest to
    D/2."""
    dead_after_tokens: int | None = Field(default=None, gt=0)
    """Rows without activation after which a latent is dead. Null, the default, takes a fortieth of the run,
    or longer until the average latent was due to be active 50 times (a tenth of the run at most), and never
    more than 10 M: with a tenth, 1 % of the latents of a short run ended silent (docs/trainer.md, "When a
    latent is dead")."""
    multi_topk: bool = False
    """Add the loss at 4K active latents, divided by 8 (Gao et al.)."""
    selection_groups: int | None = Field(default=None, gt=0)
    """Of `batchtopk`: parts of the batch, each of whole lanes, within which the largest K per row are
    selected, so that the selection does not depend on the number of processes. Null, the default, takes 8, or
    `lanes` if that is less."""
    sparsity_coefficient: float | None = Field(default=None, ge=0)
    """Of `relu`: weight of the L1 penalty; null takes 5/sqrt(D) (Anthropic, April 2024, in these units). Of
    `jumprelu`: weight of (L0/K - 1)^2; null takes 1."""
    sparsity_warmup_fraction: float = Field(default=0.05, ge=0, le=1)
    """Of `relu` and `jumprelu`: share of the steps over which that weight rises linearly from 0."""
    bandwidth: float = Field(default=0.001, gt=0)
    """Of `jumprelu`: width, in the normalised space, of the kernel through which thresholds get a gradient
    (Rajamanoharan et al. 2024, section 4)."""
    ema: bool = True
    """Keep an exponential moving average of the weights, and export it if it is better on held-out rows."""
    ema_beta: float | None = Field(default=None, ge=0, lt=1)
    """Decay rate of that average. Null, the default, takes min(0.999, 1 - 20/steps): on a run of 700 steps
    0.999 cost 0.06 of FVU."""
    sample_rows: int = Field(default=8192, gt=0)
    """Rows of the initial sample, from which the geometric median, the loss constants and the encoder's scale
    are computed."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the initial weights, and of the stream's order if `order_seed` is null."""
    order_seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Seed of the stream's order. SAEs that differ only in `seed` share one read of the dataset if this is
    set."""
    follow: bool = False
    """Train while the dataset is harvested: wait for each group of units, and see the same batches as
    later."""
    follow_seconds: float = Field(default=600.0, gt=0)
    """Seconds without the plan, or without any new unit, after which a follower gives up; the same command
    resumes."""
    mesh: MeshSpec = MeshSpec()
    """How the processes of the run (`torchrun -m winnow.trainer`) are arranged. It may change on resume."""
    device: str = "auto"
    """Device to train on: `cpu`, `cuda`, `cuda:1`, or `auto`: a GPU if there is one, otherwise the CPU."""
    threads: int = Field(default=0, ge=0)
    """CPU threads; 0, the default, takes every core. A resume is bit-identical only with the same number."""
    kernels: Literal["auto", "eager", "cpu", "triton"] = "auto"
    """How a step is computed. `auto`: `cpu` on a CPU, `triton` on a GPU; both leave one dense product per
    step. `eager`: the plain step, which specifies what the others must compute. The choice affects float
    noise only."""
    compute_dtype: ComputeDtype = "float32"
    """Type of the operands of a step's large products and gathers. Sums, weights, gradients, average and
    checkpoints are float32 in any case. `bfloat16` is meant for GPUs, whose tensor cores are many times
    faster in it; a CPU rounds in the same way, but is slower."""
    float32_products: Float32Products = Field(default="ieee", exclude_if=lambda value: value == "ieee")
    """How a GPU makes the encoder's product if `compute_dtype` is float32. `ieee`: in float32, without tensor
    cores. `bounded`: in bfloat16 on tensor cores, then in float32 for each latent that may be among the best
    by a proved bound: latents and values are those of float32. AuxK stays `ieee`; CPUs ignore it."""
    checkpoint_seconds: float = Field(default=60.0, ge=0)
    """Wall-clock seconds between checkpoints; 0 writes one after every step."""
    # At least two: the older one is the way back if the newest turns out to be damaged.
    checkpoints_kept: int = Field(default=2, ge=2)
    """Number of newest checkpoints that are kept. There must be space for one more while it is written."""
    log_every_steps: int = Field(default=10, gt=0)
    """Steps between telemetry lines."""
    tensorboard: str | None = Field(default=None, min_length=1)
    """Local folder for TensorBoard's event files, with a folder below it per run. Null, the default, writes
    none."""
    wandb: str | None = Field(default=None, min_length=1)
    """Project of Weights & Biases that telemetry is sent to. Null, the default, sends nothing anywhere."""

    @property
    def stream_seed(self) -> int:
        """Seed of the stream's order."""
        return self.seed if self.order_seed is None else self.order_seed

    @model_validator(mode="before")
    @classmethod
    def _hooks_of_set(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        fields = cast("dict[str, Any]", raw)
        if fields.get("set") is None:
            return fields
        of = SetSpec.model_validate(fields["set"])
        # The first layer's stand for the whole set; `layer_spec` gives those of the others.
        implied = {"hook": of.read_hook(of.first), "target_hook": f"{WRITES}.{of.first}"}
        return implied | {"normalize": "dataset"} | fields

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        # Everything that a step would trip over later is refused here, before a dataset is opened.
        if self.k > self.latents:
            raise ValueError(f"k must be at most latents (K <= N): k={self.k}, latents={self.latents}")
        if self.k_start is not None and not self.k <= self.k_start <= self.latents:
            raise ValueError(
                f"k_start must be from k to latents: {self.k_start}, k={self.k}, latents={self.latents}"
            )
        if self.auxk_k is not None and self.auxk_k > self.latents:
            raise ValueError(f"auxk_k must be at most latents: auxk_k={self.auxk_k}, latents={self.latents}")
        # 64: the slices of a shard (`schemas.harvest.SLICES`), of which a lane owns a whole number.
        if 64 % self.lanes:
            raise ValueError(f"lanes must divide 64, got {self.lanes}")
        # Each lane gives every batch the same number of rows.
        if self.batch_rows % self.lanes:
            raise ValueError(
                f"batch_rows must be a multiple of lanes: batch_rows={self.batch_rows}, lanes={self.lanes}"
            )
        # Groups of whole lanes contain the same rows on any mesh, since a rank owns whole lanes.
        if self.lanes % self.groups:
            raise ValueError(
                f"selection_groups must divide lanes: selection_groups={self.groups}, lanes={self.lanes}"
            )
        self._coherent_roots()
        self._coherent_parts()
        self._coherent_set()
        self._coherent_step()
        return self

    def _coherent_roots(self) -> None:
        named = {hook.rpartition("/")[0] for hook in self.read_hooks}
        if self.roots is None:
            if named != {""}:
                raise ValueError("hooks name datasets, NAME/HOOK, but there is no roots")
            return
        if self.set is not None:
            raise ValueError("set does not go with roots")
        if unknown := [hook for hook in self.read_hooks if hook.rpartition("/")[0] not in self.roots]:
            raise ValueError(
                f"with roots, a hook is NAME/HOOK, NAME one of {', '.join(self.roots)}: got {unknown}"
            )
        if unread := set(self.roots) - named:
            raise ValueError(f"roots that no hook reads: {sorted(unread)}")

    def _coherent_set(self) -> None:
        if self.set is None:
            return
        site, _, layer = self.hook.partition(".")
        known = site == self.set.reads and layer.isdecimal() and self.target_hook == f"{WRITES}.{layer}"
        if not known or (self.set.layers != "all" and int(layer) not in self.set.range):
            raise ValueError("hook and target_hook follow from `set`: leave them out")
        if self.normalize == "layer":
            raise ValueError(
                "a set needs normalize: dataset or none, since attributions are linear in what a layer reads"
            )
        refused = {"with_hooks": bool(self.with_hooks), "init_from": self.init_from is not None}
        if self.set.cross:
            refused |= {"matryoshka": bool(self.matryoshka), "multi_topk": self.multi_topk, "skip": self.skip}
            refused["activation"] = self.traits.selects is None
        for field, there in refused.items():
            if there:
                kind = "a cross-layer set" if self.set.cross else "a set"
                raise ValueError(f"{field}: {getattr(self, field)} does not go with {kind}")

    def _coherent_step(self) -> None:
        if self.batch_rows % self.accumulate:
            raise ValueError(
                f"accumulate must divide batch_rows: batch_rows={self.batch_rows}, "
                f"accumulate={self.accumulate}"
            )
        selects = self.traits.selects
        if self.accumulate > 1 and selects == "batch" and self.groups % self.accumulate:
            raise ValueError(
                "accumulate must divide selection_groups, since batchtopk selects in whole groups: "
                f"selection_groups={self.groups}, accumulate={self.accumulate}"
            )
        # ReLU and JumpReLU have any number of active latents, so their codes are dense: eager step only.
        dense = self.kernels == "eager" or selects is None
        base = {"accumulate": 1, "compute_dtype": "float32", "moments": "float32", "float32_products": "ieee"}
        fused = {name: getattr(self, name) != value for name, value in base.items()}
        if self.float32_products != "ieee" and self.compute_dtype != "float32":
            raise ValueError(f"float32_products is about float32: compute_dtype is {self.compute_dtype}")
        for field, wanted in fused.items():
            if dense and wanted:
                raise ValueError(
                    f"{field}: {getattr(self, field)} needs the fused step, which `kernels: eager` and the "
                    "activations relu and jumprelu do not have"
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
        # Only the last needs comparing: the sizes ascend.
        if self.matryoshka and self.matryoshka[-1] > self.latents:
            raise ValueError(
                f"matryoshka sizes are at most latents: {self.matryoshka[-1]}, latents={self.latents}"
            )
        if self.multi_topk and (self.activation != "topk" or self.matryoshka):
            raise ValueError("multi_topk goes with activation: topk, and not with matryoshka")

    @property
    def first_encoder_norm(self) -> float | None:
        """`encoder_norm` with null resolved; None stands for `match`."""
        if self.encoder_norm is not None:
            return None if self.encoder_norm == "match" else self.encoder_norm
        # ReLU and JumpReLU keep `match`: the scale of their codes matters from the first step, and nothing
        # else was tried for them.
        if not self.traits.selects:
            return None
        # A transcoder's encoder starts at directions that have nothing to do with its target. With `match`
        # its first predictions are wrong by more than the target's own variance, and the first steps push
        # most latents below 0 for good (docs/trainer.md, "Where the encoder starts").
        return 0.5 if self.target_hook is None else 0.1

    @property
    def traits(self) -> Traits:
        """What the activation needs to be told of."""
        return traits_of(self.activation)

    @property
    def groups(self) -> int:
        """`selection_groups` with null resolved."""
        return self.selection_groups if self.selection_groups is not None else min(8, self.lanes)

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Numbers of leading latents that must reconstruct without the others; the last is N."""
        # A size that equals N is N, and not a prefix of its own.
        return (*(size for size in self.matryoshka if size < self.latents), self.latents)

    @property
    def input_hooks(self) -> tuple[str, ...]:
        """The hooks whose rows, joined, are the input."""
        return (self.hook, *self.with_hooks)

    @property
    def output_hooks(self) -> tuple[str, ...]:
        """The hooks whose rows, joined, are reconstructed."""
        # Autoencoders and crosscoders reconstruct what they read.
        return self.target_hooks or self.input_hooks

    @property
    def target_hooks(self) -> tuple[str, ...]:
        """The hooks that a transcoder predicts: one, or those of this layer of a cross-layer set."""
        if self.set is not None and self.set.layers != "all":
            return self.set.target_hooks(self.layer)
        return () if self.target_hook is None else (self.target_hook,)

    @property
    def layer(self) -> int:
        """Of a set: the layer that these fields are of."""
        return int(self.hook.rpartition(".")[2])

    def layer_spec(self, layer: int) -> TrainSpec:
        """Of a set whose layers are resolved: the spec of one layer, written to a folder below `out`."""
        assert self.set is not None, "only a set has layers"
        hooks = {"hook": self.set.read_hook(layer), "target_hook": f"{WRITES}.{layer}"}
        return self.model_copy(update={**hooks, "out": f"{self.out.rstrip('/')}/{layer_folder(layer)}"})

    @property
    def stream_hooks(self) -> tuple[str, ...]:
        """Every hook of the run's stream: of a set, those of all its layers."""
        return self.read_hooks if self.set is None else self.set.hooks

    @property
    def place(self) -> str:
        """Where it reads, for people: its hook, or a set's site and layers."""
        if self.set is None or self.set.layers == "all":
            return self.hook
        return f"{self.set.reads}.{self.set.range.start}-{self.set.range.stop - 1}"

    @property
    def read_hooks(self) -> tuple[str, ...]:
        """Every hook that is read from the dataset."""
        # Not input_hooks + output_hooks: a crosscoder's outputs are its inputs, and would be read twice.
        return self.input_hooks + self.target_hooks

    def parts(self, widths: dict[str, int]) -> SaeParts:
        """Return what the SAE is made of, given each hook's width."""
        target = self.target_hook
        targets = tuple(widths[hook] for hook in self.target_hooks)
        return SaeParts(
            activation=self.activation,
            d_out=sum(targets) or None,
            target_widths=targets if len(targets) > 1 else (),
            target_normalize=cast("Literal['dataset', 'none']", self.target_normalize) if target else None,
            skip=self.skip,
            widths=tuple(widths[hook] for hook in self.input_hooks) if self.with_hooks else (),
            matryoshka=self.matryoshka,
        )


class SaeIdentity(Contract):
    """The dataset and the subject that an SAE was trained on."""

    plan_fingerprint: Sha256
    """Fingerprint of the dataset's plan."""
    dataset_sha256: Sha256 | None
    """Digest of the dataset; null if it was not sealed yet, so that only the plan says what was harvested."""
    subject_model: str
    """Name of the subject model, from the plan."""
    subject_weights_sha256: Sha256
    """Digest of the subject's weights; SAEs and datasets are matched by it, not by the name."""
    derived: tuple[DeriveRule, ...] = Field(default=(), exclude_if=lambda rules: not rules)
    """Rules by which `winnow derive` made the dataset's rows; empty if they are the subject's own."""
    roots: dict[RootName, SaeIdentity] = Field(default={}, exclude_if=lambda roots: not roots)
    """Of an SAE of several datasets (`TrainSpec.roots`): each one's. The fields above then stand for all of
    them together. Empty otherwise."""


class SaeCard(Artefact):
    """`sae.json`: everything that is needed to use `sae.safetensors`, and where it came from."""

    kind: Literal["winnow.sae"] = "winnow.sae"
    version: str = "1.1"
    """1.1 added the parts; 1.0 knew one, TopK, and named it `architecture`."""
    d_model: int = Field(gt=0)
    """Width D of the input; for a crosscoder the sum over its hooks."""
    latents: int = Field(gt=0)
    """Number of latents N."""
    k: int = Field(gt=0)
    """Active latents K per row that it was trained for."""
    hook: ReadHook
    """Hook at which the input is read; for a crosscoder the first one."""
    with_hooks: tuple[ReadHook, ...] = ()
    """The other hooks of a crosscoder, in the order in which rows are concatenated."""
    target_hook: ReadHook | None = None
    """Hook that a transcoder reconstructs; null for other SAEs."""
    with_targets: tuple[ReadHook, ...] = Field(default=(), exclude_if=lambda hooks: not hooks)
    """Of a layer of a cross-layer transcoder: the later layers' hooks that it contributes to, in the order in
    which their rows are concatenated after those of `target_hook`."""
    # Stored with the SAE and applied by it, so that no user can feed it rows in another scale.
    normalize: Normalize
    """How it normalises its input (`TrainSpec.normalize`)."""
    parts: SaeParts = SaeParts()
    """What it is made of besides its sizes."""
    weights: Literal["raw", "ema"]
    """Which weights are exported, the last ones or their moving average: those that were better on held-out
    rows."""
    weights_sha256: Sha256
    """Digest of `sae.safetensors`."""
    identity: SaeIdentity | None = None
    """What it was trained on; null if it was imported."""
    window: WindowRule | None = Field(default=None, exclude_if=lambda rule: rule is None)
    """How the windows that it was trained on begin; null if that was not recorded."""
    spec: TrainSpec | None = None
    """The spec that it was trained with; null if it was imported."""
    metrics: dict[str, float] = {}
    """Held-out figures by the id of their definition, such as `fvu_normalised.raw`."""
    notes: tuple[str, ...] = Field(default=(), exclude_if=lambda notes: not notes)
    """Of an import: a sentence for each fact in the other library's files that the SAE cannot represent."""

    @model_validator(mode="before")
    @classmethod
    def _from_1_0(cls, raw: Any) -> Any:
        # Unknown fields are refused, so the one that 1.0 had and 1.1 has not must go before validation. Any
        # other architecture than TopK stays in place and is refused.
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
        # No widths means one hook, of width d_model.
        widths = self.parts.widths
        if (len(widths) or 1) != 1 + len(self.with_hooks) or (widths and sum(widths) != self.d_model):
            raise ValueError(f"parts.widths {widths} do not fit the hooks, or d_model {self.d_model}")
        if (len(self.parts.target_widths) or 1) != 1 + len(self.with_targets):
            raise ValueError(f"parts.target_widths do not fit the targets: {self.parts.target_widths}")
        return self

    @property
    def rows(self) -> RowsSpec:
        """The rows that it was trained on; all of an import."""
        return self.spec.rows if self.spec is not None else RowsSpec()

    @property
    def roots(self) -> dict[str, str]:
        """Of an SAE of several datasets: where they were when it was trained. Empty otherwise."""
        return (self.spec.roots if self.spec is not None else None) or {}

    @property
    def input_hooks(self) -> tuple[str, ...]:
        """The hooks whose rows, joined, are the input."""
        return (self.hook, *self.with_hooks)

    @property
    def output_hooks(self) -> tuple[str, ...]:
        """The hooks whose rows, joined, are reconstructed."""
        return self.target_hooks or self.input_hooks

    @property
    def target_hooks(self) -> tuple[str, ...]:
        """The hooks that a transcoder predicts, its own layer's first; none for other SAEs."""
        return () if self.target_hook is None else (self.target_hook, *self.with_targets)
