"""The explorer's index: what was asked for, and what was found."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from winnow.schemas.base import Artefact, Contract, HookName, Sha256
from winnow.schemas.subject import SubjectIdentity
from winnow.schemas.window import WindowRule


class IndexSpec(Contract):
    """What an index of latents holds. Another spec makes another index."""

    units: int | None = Field(default=None, gt=0)
    """Units of the dataset that are read, the first ones; null reads all, held-out ones included."""
    top: int = Field(default=16, ge=1, le=64)
    """Windows kept a latent: those with its highest activations, exactly."""
    bands: int = Field(default=5, ge=1, le=10)
    """Bands of equal count that a latent's activations are cut into, from weak to strong."""
    per_band: int = Field(default=4, ge=0, le=16)
    """Activations drawn at random from each band, with their windows."""
    before: int = Field(default=24, ge=0, le=512)
    """Tokens shown before the token an example is about."""
    after: int = Field(default=12, ge=0, le=512)
    """Tokens shown after it."""
    logits: int = Field(default=12, ge=0, le=64)
    """Tokens listed that a latent promotes, and as many that it suppresses; 0 runs without the subject's
    weights."""
    neighbours: int = Field(default=12, ge=0, le=64)
    """Nearest latents listed, by decoder cosine and by co-activation; 0 leaves both out."""
    coactivation_rows: int = Field(default=512, ge=1, le=1 << 16)
    """Firings of a latent looked at for co-activation: all of them where it has no more, else a random
    draw."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the random draws."""


class FeatureIndex(Artefact):
    """`index.json`: the index is whole. Written last.

    Beside it: `latents/part-NNNNN.parquet` (one row a latent), `summary.parquet` (scalars of all latents),
    `vocabulary.parquet` (each token's text).
    """

    kind: Literal["winnow.features"] = "winnow.features"
    spec: IndexSpec
    sae_sha256: Sha256
    """Digest of the SAE's weights."""
    hook: HookName
    d_model: int = Field(gt=0)
    latents: int = Field(gt=0)
    part_latents: int = Field(gt=0)
    """Latents in a part; the last part may hold fewer."""
    group_latents: int = Field(gt=0)
    """Latents in a row group: what a page reads."""
    root: str = Field(min_length=1, max_length=4096)
    """The dataset, as it was named when the index was made."""
    plan_fingerprint: Sha256
    dataset_sha256: Sha256 | None
    subject: SubjectIdentity
    context_length: int = Field(gt=0)
    """Tokens T of a window."""
    drop_leading: int = Field(ge=0)
    """Leading positions of a window that are not read."""
    sink_multiple: float = Field(gt=0)
    """A row whose norm passes this multiple of the median norm is a sink, and not read."""
    window: WindowRule | None = Field(default=None, exclude_if=lambda rule: rule is None)
    """How a window begins; null in an index made before this was written down: the dataset's plan says it."""
    windows: int = Field(gt=0)
    """Windows read."""
    rows: int = Field(ge=0)
    """Rows of weight above 0 among them: what a density is a share of."""
    bin_count: int = Field(gt=0)
    """Bins of a latent's histogram: equal widths from 0 to its largest activation."""
    created: str
    """UTC time, ISO 8601."""


class Explanation(Contract):
    """One line of `explanations.jsonl` beside an index: what somebody or something says a latent means."""

    latent: int = Field(ge=0)
    text: str = Field(min_length=1, max_length=2000)
    source: str = Field(default="", max_length=100)
    """Who says so, such as `n2g` or a name."""
    score: float | None = None
    """How well it predicts the latent, in the source's own measure; 1 is perfect."""
