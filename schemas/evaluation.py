"""Evaluation: what to measure (the spec) and what was measured (`evaluation.json`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from winnow.schemas.base import Artefact, Contract, ReadHook, RootName, Sha256
from winnow.schemas.readings import RowsSpec

# The order matters: `compute` reads the figures of `downstream`, and `n2g` reuses its losses.
FAMILIES = (
    "reconstruction",
    "downstream",
    "compute",
    "stability",
    "ablation",
    "probes",
    "n2g",
    "judge",
    "diffing",
)
"""Families of metrics, in the order in which they are measured and shown."""
# The same names again, because a type cannot be made from a tuple's values.
Family = Literal[
    "reconstruction", "downstream", "compute", "stability", "ablation", "probes", "n2g", "judge", "diffing"
]
FigureId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+(\.[a-z0-9_]+)*$", max_length=80)]


class ComputeLaw(Contract):
    """How the loss of the subject's family falls with training compute: L(C) = floor + (C / scale)^-power.

    There is no default, because no law is assumed. Fit it on the same text as the windows that are evaluated.
    """

    floor: float = Field(ge=0)
    """Irreducible loss, in nats per token."""
    scale: float = Field(gt=0)
    """Training compute at which the reducible loss is 1 nat, in FLOP."""
    power: float = Field(gt=0)
    """Exponent, given as a positive number."""
    training_flop: float = Field(gt=0)
    """Training compute of the subject itself, in FLOP, such as 6 x parameters x tokens."""
    source: str = Field(min_length=1)
    """Where the constants come from. It is printed with every figure that uses them."""


class JudgeSpec(Contract):
    """A language model behind an OpenAI-compatible API that explains latents and is quizzed on explanations.

    Snippets of the dataset's text are sent to it, which is why no endpoint is the default.
    """

    endpoint: str = Field(min_length=1, max_length=2048)
    """Base address of the API, such as `http://127.0.0.1:8000/v1`; `/chat/completions` is appended. A key is
    read from the environment variable WINNOW_JUDGE_KEY, never from a config."""
    model: str = Field(min_length=1, max_length=256)
    """Name of the model at that endpoint."""
    explanations: str | None = None
    """File of JSON lines `{"latent": 3, "text": "..."}` with the explanations to judge. Null, the default,
    lets the model write them."""
    latents: int = Field(default=32, ge=1)
    """Latents to explain, drawn at random from those that are active in `examples` training windows or more.
    Not used if `explanations` names them."""
    examples: int = Field(default=10, ge=2, le=100)
    """Top training windows shown per latent, and held-out snippets of each kind that a quiz asks about."""
    tokens: int = Field(default=32, ge=4, le=512)
    """Length of a snippet in tokens."""
    parallel: int = Field(default=4, ge=1, le=64)
    """Requests in flight at the same time."""
    timeout_seconds: float = Field(default=120.0, gt=0)
    """Longest wait for an answer, in seconds."""


class EvaluateSpec(Contract):
    """Section `evaluate`: sample sizes, and what optional families need."""

    metrics: tuple[Family, ...] | None = None
    """Families to measure. Null, the default, measures all that have what they need: `compute` needs a law,
    `stability` other SAEs, `judge` a judge, `diffing` a crosscoder."""
    subjects: dict[RootName, str] = {}
    """Of an SAE of several datasets: where a subject's files are (as `subject.model`) if not where its plan
    says, for `downstream`, attribution, the index and the explorer. Its weights must be those of the plan."""
    windows: int = Field(default=256, ge=1)
    """Largest number of held-out windows: the first in the plan's order, which is random."""
    batch_windows: int = Field(default=4, ge=1)
    """Windows in one pass of the subject. Small, because the clean and the patched logits take batch_windows
    x T x V numbers each. Another number moves float noise only."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the bootstrap and of every random choice."""
    rows: RowsSpec | None = Field(default=None, exclude_if=lambda rows: rows is None)
    """Held-out rows that figures are of, chosen by the labels of their tokens; null takes those that the SAE
    was trained on, `{}` all."""
    law: ComputeLaw | None = None
    """compute: the scaling law of the subject's family. Null, the default, leaves `compute` out, because no
    law is assumed."""
    against: tuple[str, ...] = ()
    """stability: folders or URIs of SAEs that were trained with other seeds."""
    ablation_rows: int = Field(default=64, ge=2)
    """ablation: rows to sample, each from another window as long as there are unused windows; no row twice. A
    row costs 2 `ablation_latents` + 1 runs above the hook, which is why not all rows are taken."""
    ablation_latents: int = Field(default=8, ge=1)
    """ablation: active latents to sample at each row, and as many residual channels."""
    ablation_tokens: int = Field(default=16, ge=1)
    """ablation: positions whose logits are compared, beginning with the ablated one. 16 as in Gao et al.
    2024."""
    tasks: str | None = None
    """probes: folder of tasks as Parquet (text, label, optionally split). Null, the default, builds and uses
    our own suite."""
    probe_train: int = Field(default=120, ge=8)
    """probes: largest number of training texts per task, both labels together."""
    probe_test: int = Field(default=80, ge=4)
    """probes: largest number of test texts per task, both labels together."""
    probe_tokens: int = Field(default=32, ge=4)
    """probes: tokens read per text, the first."""
    probe_ridge: float = Field(default=1e-2, gt=0)
    """probes: ridge penalty. Half of it times the squared weight of a standardised input is added to the mean
    cross-entropy."""
    n2g_latents: int | None = Field(default=32, ge=1)
    """n2g: latents to explain, drawn at random from those that are active in `n2g_examples` windows or more;
    null takes all of them. 32, because the time grows about in proportion to their number."""
    n2g_examples: int = Field(default=12, ge=1)
    """n2g: top activations that a trie is learnt from, each from another training window."""
    n2g_train_rows: int = Field(default=65_536, ge=1)
    """n2g, judge: training rows to search for top activations: the first units that hold as many."""
    n2g_positives: int = Field(default=16, ge=1)
    """n2g: largest number of held-out tokens per latent that recall is measured on, drawn at random from
    those on which it is active."""
    judge: JudgeSpec | None = None
    """judge: the language model to ask. Null, the default, leaves `judge` out and sends nothing anywhere."""

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.metrics is not None and len(set(self.metrics)) != len(self.metrics):
            raise ValueError("metrics must not repeat")
        return self


class Figure(Contract):
    """One number with its definition, sample and interval."""

    id: FigureId
    """Id of its definition in docs/evaluation.md."""
    value: float | None
    """The number; null if there is none, and then `note` says why."""
    low: float | None = None
    """Lower end of the 95 % interval; null for counts and for samples of one, which have none."""
    high: float | None = None
    """Upper end of the 95 % interval; null if `low` is."""
    samples: int = Field(ge=0)
    """Size of the sample, in units of `unit`."""
    unit: str = "windows"
    """What was sampled, and therefore what the bootstrap resamples."""
    note: str = ""
    """What a reader of this number must know; empty if nothing."""


class FamilyResult(Contract):
    """The figures of one family, finished."""

    settings_sha256: Sha256
    """Digest of everything that the figures depend on. If it has changed, the family is measured again."""
    settings: dict[str, Any] = Field(default={}, exclude_if=lambda found: not found)
    """Those fields of section `evaluate` that the figures depend on; empty in files older than version
    1.1."""
    figures: tuple[Figure, ...]
    """The figures, in the order in which they are shown."""
    details: dict[str, Any] = {}
    """What stands behind the figures: per task, per latent, histograms."""
    notes: tuple[str, ...] = ()
    """What a reader must know, such as the law that was used or a share that was left out."""
    seconds: float = Field(ge=0)
    """Wall-clock time that measuring took, in seconds."""
    finished: str
    """UTC time, ISO 8601."""


LOSSES_KEY = "losses.json"


class PartialLosses(Artefact):
    """`losses.json`: losses of the windows that have been measured in the subject so far.

    It is removed once `summary.json` or `evaluation.json` has the figures; deleting it earlier only costs
    time.
    """

    kind: Literal["winnow.losses"] = "winnow.losses"
    settings_sha256: Sha256
    """Digest of everything that the losses depend on."""
    losses: dict[str, tuple[float, ...]]
    """Variant (`clean`, `sae`, `kl.sae`, ...) -> nats per token of each window, from the first."""
    finished: dict[str, dict[str, tuple[float, ...]]] = {}
    """Of an SAE of several subjects: name of the dataset -> the losses in its subject, of all windows."""

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        if any(
            len({len(each) for each in one.values()}) > 1 for one in (self.losses, *self.finished.values())
        ):
            raise ValueError("losses must be of the same windows")
        return self


class Evaluation(Artefact):
    """`evaluation.json`, beside the SAE. Rewritten as each family finishes."""

    kind: Literal["winnow.evaluation"] = "winnow.evaluation"
    version: str = "1.1"
    """1.1 added `earlier` and `others`; in 1.0 a second dataset or setting replaced the first."""
    sae: str
    """Address of the SAE as it was given."""
    sae_sha256: Sha256
    """Digest of the SAE's weights file; of a transcoder set, of `set.json`, which holds the layers'."""
    plan_fingerprint: Sha256
    """Fingerprint of the dataset whose held-out windows were used."""
    dataset_sha256: Sha256 | None
    """Digest of that dataset; null if it was not sealed."""
    # Absent fields stay absent, so that a file of version 1.0 is written back as it was.
    root: str | None = Field(default=None, exclude_if=lambda found: found is None)
    """Address of the dataset; null in files older than version 1.1."""
    subject_model: str
    """Name of the subject model, from the dataset's plan."""
    subject_weights_sha256: Sha256
    """Digest of the subject's weights."""
    hook: ReadHook
    """The hook that the SAE reads; of a transcoder set, the first."""
    reads: tuple[ReadHook, ...] = Field(default=(), exclude_if=lambda hooks: not hooks)
    """Of a transcoder set or a crosscoder: the hooks that it reads. Empty for an SAE of one hook."""
    latents: int = Field(gt=0)
    """Number of latents N; of a transcoder set, of all layers."""
    k: int = Field(gt=0)
    """Active latents K per row that the SAE was trained for; of a transcoder set, of all layers."""
    trained_on_this: bool
    """Whether the SAE's card names the same plan. If not, these windows may have been among its training
    rows."""
    families: dict[Family, FamilyResult] = {}
    """The newest result of each family on this dataset."""
    earlier: dict[Family, tuple[FamilyResult, ...]] = Field(default={}, exclude_if=lambda found: not found)
    """Results of the same families with other settings, the newest first."""
    others: tuple[Evaluation, ...] = Field(default=(), exclude_if=lambda found: not found)
    """Evaluations on other datasets, the newest first, and of other weights that had this address."""

    @field_validator("families", "earlier")
    @classmethod
    def _in_order(cls, found: dict[Family, Any]) -> dict[Family, Any]:
        # JSON is stored with sorted keys: the order of measurement is restored for tables.
        return {name: found[name] for name in FAMILIES if name in found}

    @model_validator(mode="after")
    def _flat(self) -> Self:
        # One level only: `each` and `on` look no deeper, so figures nested further down would be lost to
        # them.
        if any(other.others for other in self.others):
            raise ValueError("others: an evaluation among others cannot have others itself")
        return self

    @property
    def each(self) -> tuple[Evaluation, ...]:
        """This evaluation without the others, then the others."""
        return (self.model_copy(update={"others": ()}), *self.others)

    def on(self, plan_fingerprint: str) -> Evaluation | None:
        """Find the newest evaluation on the dataset of that plan, without its others, or None."""
        return next((one for one in self.each if one.plan_fingerprint == plan_fingerprint), None)

    def results(self, family: Family) -> tuple[FamilyResult, ...]:
        """List a family's results on this dataset, the newest first."""
        newest = (self.families[family],) if family in self.families else ()
        return (*newest, *self.earlier.get(family, ()))

    def having(self, family: Family, result: FamilyResult) -> Evaluation:
        """Return this evaluation with a family's newest result; those of other settings become earlier."""
        # A result with the same settings is replaced: it would differ from the new one in float noise only.
        others = [one for one in self.results(family) if one.settings_sha256 != result.settings_sha256]
        earlier = self.earlier | ({family: tuple(others)} if others else {})
        changed = {"families": self.families | {family: result}, "earlier": earlier}
        # Not model_copy, which skips the validators and with them the order of the families.
        return Evaluation.model_validate(dict(self) | changed)

    def figure(self, id: str) -> Figure | None:
        """Find the newest figure with that definition; None if it was not measured."""
        for family in self.families.values():
            for figure in family.figures:
                if figure.id == id:
                    return figure
        return None
