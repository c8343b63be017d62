"""The explorer's index: what to build (the spec) and what was built (`index.json`)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from winnow.schemas.base import Artefact, Contract, HookName, ReadHook, RootName, Sha256
from winnow.schemas.joined import split_hook
from winnow.schemas.readings import RowsSpec
from winnow.schemas.subject import SubjectIdentity, parse_hook
from winnow.schemas.window import WindowRule

INSIDE = {"mlp_in": "the MLP alone reads", "router": "only chooses experts"}
"""Sites whose rows reach the residual stream by no linear path -> what becomes of them."""
HEADS = "attn_z"
"""The site whose rows reach it through a projection."""


def site_of(hook: str) -> str | None:
    """The site of a hook, such as `attn_z`, with or without its dataset's name; None of a module's path."""
    named = parse_hook(split_hook(hook)[1])
    return None if named is None else named[0]


class IndexSpec(Contract):
    """What an index of latents contains. Another spec makes another index."""

    units: int | None = Field(default=None, gt=0)
    """Units of the dataset to read, beginning with the first; null, the default, reads all, including the
    held-out ones."""
    top: int = Field(default=16, ge=1, le=64)
    """Windows kept per latent: exactly those with its highest activations."""
    bands: int = Field(default=5, ge=1, le=10)
    """Quantile bands of equal count into which a latent's activations are divided, from weak to strong."""
    per_band: int = Field(default=4, ge=0, le=16)
    """Activations kept per band, with their windows, drawn at random."""
    before: int = Field(default=24, ge=0, le=512)
    """Tokens shown before the token on which a latent is active. More than after it, because a causal model
    has read only these."""
    after: int = Field(default=12, ge=0, le=512)
    """Tokens shown after that token."""
    logits: int = Field(default=12, ge=0, le=64)
    """Tokens listed that a latent promotes most, and as many that it suppresses most. With 0 the subject's
    weights are not needed; SAEs of `mlp_in` and `router`, which add nothing to the stream, need 0."""
    neighbours: int = Field(default=12, ge=0, le=64)
    """Nearest latents listed, by decoder cosine and again by co-activation; 0 leaves both lists out."""
    coactivation_rows: int = Field(default=512, ge=1, le=1 << 16)
    """Rows per latent on which co-activation is counted: all on which it is active, or a random draw of this
    many if there are more, so that a frequent latent costs no more than a rare one."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the random draws."""
    rows: RowsSpec | None = Field(default=None, exclude_if=lambda rows: rows is None)
    """Rows that latents are shown on, chosen by the labels of their tokens; null takes those that the SAE was
    trained on."""


class IndexPart(Contract):
    """A part of a crosscoder: one of the hooks that it reads."""

    name: str = Field(pattern=r"^[a-z0-9_]+$", max_length=241)
    """Its name in figures: that of its dataset, or of its hook if several hooks are of one dataset."""
    hook: ReadHook
    """The hook that it reads."""
    d_model: int = Field(gt=0)
    """Width D of the activations there."""


class FeatureIndex(Artefact):
    """`index.json`: the index is complete. It is written last.

    Beside it: `latents/part-NNNNN.parquet` (one row per latent), `summary.parquet` (scalars of all latents),
    `vocabulary.parquet` (each token's text).
    """

    kind: Literal["winnow.features"] = "winnow.features"
    spec: IndexSpec
    """The spec it was built from."""
    sae_sha256: Sha256
    """Digest of the SAE's weights."""
    hook: ReadHook
    """The hook that the SAE reads; of a crosscoder, the first one."""
    # Left out of the JSON while empty: the index of an autoencoder is written as before the field existed.
    target_hooks: tuple[HookName, ...] = Field(default=(), exclude_if=lambda hooks: not hooks)
    """The hooks that a transcoder predicts; empty for other SAEs."""
    parts: tuple[IndexPart, ...] = Field(default=(), exclude_if=lambda parts: not parts)
    """The parts of a crosscoder, in the order in which rows are concatenated; empty for other SAEs."""
    d_model: int = Field(gt=0)
    """Width D of the activations at the hook; of a crosscoder, of all parts together."""
    latents: int = Field(gt=0)
    """Number of latents N."""
    part_latents: int = Field(gt=0)
    """Latents per Parquet file; the last file may contain fewer."""
    group_latents: int = Field(gt=0)
    """Latents per row group, which is the least that a feature page reads."""
    root: str = Field(min_length=1, max_length=4096)
    """Address of the dataset as it was given when the index was built."""
    roots: dict[RootName, str] = Field(default={}, exclude_if=lambda roots: not roots)
    """Of an SAE of several datasets: their addresses by name. `root` is then one of them."""
    plan_fingerprint: Sha256
    """Fingerprint of the dataset's plan."""
    dataset_sha256: Sha256 | None
    """Digest of the dataset; null if it was not sealed."""
    subject: SubjectIdentity
    """The subject that the dataset was harvested from; of several datasets, all of their subjects as one."""
    subjects: dict[RootName, SubjectIdentity] = Field(default={}, exclude_if=lambda subjects: not subjects)
    """Of an SAE of several datasets: the subject of each, by the name of the dataset. Empty otherwise."""
    context_length: int = Field(gt=0)
    """Window length T in tokens."""
    drop_leading: int = Field(ge=0)
    """Leading positions of each window that are not stored, and so not in the index."""
    sink_multiple: float = Field(gt=0)
    """A row whose norm exceeds this multiple of its unit's median norm is a sink and is left out."""
    # Left out of the JSON while null: an index built before the field existed is read and written unchanged.
    window: WindowRule | None = Field(default=None, exclude_if=lambda rule: rule is None)
    """How windows begin; null in an index built before this was recorded, for which the dataset's plan says
    it."""
    # Left out of the JSON while false: the index of any other hook is written as before the field existed.
    projected: bool = Field(default=False, exclude_if=lambda projected: not projected)
    """Whether promoted tokens of latents at `attn_z` are those of what their rows add to the residual stream,
    behind the projection. An index made before this was so has the tokens of the rows themselves."""
    windows: int = Field(gt=0)
    """Windows read."""
    rows: int = Field(ge=0)
    """Rows of weight above 0 in those windows: densities are shares of them."""
    bin_count: int = Field(gt=0)
    """Bins of a latent's histogram, of equal width from 0 to its largest activation."""
    created: str
    """When it was built: UTC, ISO 8601."""

    @property
    def written_hooks(self) -> tuple[str, ...]:
        """The hooks that the latents' decoder rows are of."""
        return self.target_hooks or tuple(part.hook for part in self.parts) or (self.hook,)

    @property
    def misread_hook(self) -> str | None:
        """The hook whose rows an earlier version took for directions of the residual stream, if any."""
        if self.spec.logits:
            for hook in self.written_hooks:
                site = site_of(hook)
                if site in INSIDE or (site == HEADS and not self.projected):
                    return hook
        return None


class Explanation(Contract):
    """One line of `explanations.jsonl` beside an index: what a person or a method says a latent means."""

    latent: int = Field(ge=0)
    """Number of the latent."""
    text: str = Field(min_length=1, max_length=2000)
    """The explanation."""
    source: str = Field(default="", max_length=100)
    """Where it comes from, such as `n2g` or a person's name."""
    score: float | None = None
    """How well it predicts the latent, by the source's own measure; 1 is perfect."""
