"""Evaluation: what to measure (spec) and what was measured (`evaluation.json`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from winnow.schemas.base import Artefact, Contract, HookName, Sha256

FAMILIES = ("reconstruction", "downstream", "compute", "stability", "ablation", "probes", "n2g", "judge")
"""Metric families, in the order they are measured and shown."""
Family = Literal["reconstruction", "downstream", "compute", "stability", "ablation", "probes", "n2g", "judge"]
FigureId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+(\.[a-z0-9_]+)*$", max_length=80)]


class ComputeLaw(Contract):
    """How the loss of the subject's family falls with training compute: L(C) = floor + (C / scale)^-power.

    Fit it on the same text as the windows that are evaluated; there is no default.
    """

    floor: float = Field(ge=0)
    """Irreducible loss, nats a token."""
    scale: float = Field(gt=0)
    """FLOP at which the reducible loss is 1 nat."""
    power: float = Field(gt=0)
    """Exponent, positive."""
    training_flop: float = Field(gt=0)
    """FLOP the subject itself was trained with, such as 6 x parameters x tokens."""
    source: str = Field(min_length=1)
    """Where the constants come from; printed with every figure that uses them."""


class JudgeSpec(Contract):
    """A language model that explains latents and is quizzed on explanations, behind an OpenAI-compatible API.

    Snippets of the dataset's text are sent to it.
    """

    endpoint: str = Field(min_length=1, max_length=2048)
    """The API's base address, such as `http://127.0.0.1:8000/v1`; `/chat/completions` is appended.
    A key comes from the environment variable WINNOW_JUDGE_KEY."""
    model: str = Field(min_length=1, max_length=256)
    """Name of the model, as the endpoint knows it."""
    explanations: str | None = None
    """A file of JSON lines `{"latent": 3, "text": "..."}` to be judged; null: the model explains itself."""
    latents: int = Field(default=32, ge=1)
    """Latents drawn at random from those active often enough, where it explains itself."""
    examples: int = Field(default=10, ge=2, le=100)
    """Top training windows it sees of a latent, and held-out snippets of each kind it is quizzed on."""
    tokens: int = Field(default=32, ge=4, le=512)
    """Tokens of a snippet."""
    parallel: int = Field(default=4, ge=1, le=64)
    """Requests under way at once."""
    timeout_seconds: float = Field(default=120.0, gt=0)
    """Longest wait for an answer."""


class EvaluateSpec(Contract):
    """Section `evaluate`: sample sizes and what optional families need. Every field moves figures."""

    metrics: tuple[Family, ...] | None = None
    """Families measured; null measures all that have what they need (`compute` a law, `stability` other
    SAEs, `judge` a judge)."""
    windows: int = Field(default=256, ge=1)
    """Held-out windows used at the most, the first in the plan's (random) order."""
    batch_windows: int = Field(default=4, ge=1)
    """Windows in one pass of the subject; logits take batch_windows x T x V numbers, twice."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Bootstrap draws and every random choice."""
    law: ComputeLaw | None = None
    """compute: the family's law; null leaves the family out."""
    against: tuple[str, ...] = ()
    """stability: SAEs of other seeds, folders or URIs."""
    ablation_rows: int = Field(default=64, ge=2)
    """ablation: rows sampled; each stands in another window as long as windows last."""
    ablation_latents: int = Field(default=8, ge=1)
    """ablation: active latents sampled at each row, and as many residual channels."""
    ablation_tokens: int = Field(default=16, ge=1)
    """ablation: positions T whose logits are compared, the ablated one first."""
    tasks: str | None = None
    """probes: a folder of Parquet tasks (text, label[, split]); null builds and uses the suite of our own."""
    probe_train: int = Field(default=120, ge=8)
    """probes: training texts of a task at the most, both labels together."""
    probe_test: int = Field(default=80, ge=4)
    """probes: test texts of a task at the most."""
    probe_tokens: int = Field(default=32, ge=4)
    """probes: tokens read of each text."""
    probe_ridge: float = Field(default=1e-2, gt=0)
    """probes: penalty on the squared weight of a standardised input, beside the mean cross-entropy."""
    n2g_latents: int | None = Field(default=32, ge=1)
    """n2g: latents drawn at random from those active often enough; null takes all of them."""
    n2g_examples: int = Field(default=12, ge=1)
    """n2g: top activations, each of another training window, that a trie is learnt from."""
    n2g_train_rows: int = Field(default=65_536, ge=1)
    """n2g: training rows searched for top activations, the first in stored order, in whole units."""
    n2g_positives: int = Field(default=16, ge=1)
    """n2g: random held-out positive tokens a latent for recall, at the most."""

    judge: JudgeSpec | None = None
    """judge: the language model that is asked; null leaves the family out."""

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.metrics is not None and len(set(self.metrics)) != len(self.metrics):
            raise ValueError("metrics must not repeat")
        return self


class Figure(Contract):
    """One number with its definition and how sure it is."""

    id: FigureId
    """The definition, as in docs/evaluation.md."""
    value: float | None
    """Null where it does not exist; `note` says why."""
    low: float | None = None
    """Lower end of the 95 % interval."""
    high: float | None = None
    """Upper end of the 95 % interval."""
    samples: int = Field(ge=0)
    """Size of the sample, in `unit`s."""
    unit: str = "windows"
    """What was sampled, and what the bootstrap draws from."""
    note: str = ""


class FamilyResult(Contract):
    """One family, finished."""

    settings_sha256: Sha256
    """Digest of everything it depended on: another one is measured again."""
    settings: dict[str, Any] = Field(default={}, exclude_if=lambda found: not found)
    """The fields of section `evaluate` that it depended on; empty in files of before 1.1."""
    figures: tuple[Figure, ...]
    details: dict[str, Any] = {}
    """Per task, per latent, histograms."""
    notes: tuple[str, ...] = ()
    """What a reader must know, such as the law used or a share left out."""
    seconds: float = Field(ge=0)
    """Wall-clock it took."""
    finished: str
    """UTC time, ISO 8601."""


class Evaluation(Artefact):
    """`evaluation.json`, beside the SAE. Rewritten as each family finishes."""

    kind: Literal["winnow.evaluation"] = "winnow.evaluation"
    version: str = "1.1"
    """1.1 added what other datasets and settings gave; in 1.0 a second one took the first one's place."""
    sae: str
    """The SAE's address as it was given."""
    sae_sha256: Sha256
    """Digest of its weights file."""
    plan_fingerprint: Sha256
    """Of the dataset whose held-out windows were used."""
    dataset_sha256: Sha256 | None
    root: str | None = Field(default=None, exclude_if=lambda found: found is None)
    """The dataset, as it was named; null in files of before 1.1."""
    subject_model: str
    subject_weights_sha256: Sha256
    hook: HookName
    latents: int = Field(gt=0)
    k: int = Field(gt=0)
    trained_on_this: bool
    """Whether the SAE's card names the same plan: else its training rows may hold these windows."""
    families: dict[Family, FamilyResult] = {}
    earlier: dict[Family, tuple[FamilyResult, ...]] = Field(default={}, exclude_if=lambda found: not found)
    """The same families with other settings, the newest first."""
    others: tuple[Evaluation, ...] = Field(default=(), exclude_if=lambda found: not found)
    """Other datasets, the newest first (and other weights that had this address)."""

    @field_validator("families", "earlier")
    @classmethod
    def _in_order(cls, found: dict[Family, Any]) -> dict[Family, Any]:
        return {name: found[name] for name in FAMILIES if name in found}

    @model_validator(mode="after")
    def _flat(self) -> Self:
        if any(other.others for other in self.others):
            raise ValueError("others: an evaluation among others cannot have others itself")
        return self

    @property
    def each(self) -> tuple[Evaluation, ...]:
        """This one without the others, then the others."""
        return (self.model_copy(update={"others": ()}), *self.others)

    def on(self, plan_fingerprint: str) -> Evaluation | None:
        """The newest on the dataset of that plan, without the others; None where there is none."""
        return next((one for one in self.each if one.plan_fingerprint == plan_fingerprint), None)

    def results(self, family: Family) -> tuple[FamilyResult, ...]:
        """All that a family gave on this dataset, the newest first."""
        newest = (self.families[family],) if family in self.families else ()
        return (*newest, *self.earlier.get(family, ()))

    def having(self, family: Family, result: FamilyResult) -> Evaluation:
        """This evaluation with a family's newest result; one with other settings becomes an earlier one."""
        others = [one for one in self.results(family) if one.settings_sha256 != result.settings_sha256]
        earlier = self.earlier | ({family: tuple(others)} if others else {})
        changed = {"families": self.families | {family: result}, "earlier": earlier}
        return Evaluation.model_validate(dict(self) | changed)

    def figure(self, id: str) -> Figure | None:
        """The figure of that definition, or None."""
        for family in self.families.values():
            for figure in family.figures:
                if figure.id == id:
                    return figure
        return None
