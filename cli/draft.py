"""From what is known of a model and a corpus to a config with comments. Pure.

Letters: T context length, D width, N latents, K active latents per row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import yaml

from winnow.common.figures import count_of
from winnow.common.yaml_text import parse_value
from winnow.harvester.plan.survey import Survey
from winnow.schemas.errors import ConfigError
from winnow.schemas.harvest import SLICES

DEFAULT_TOKENS = 50_000_000
"""Most tokens that are harvested unless more are asked for."""
_CONTEXTS = (128, 512)
"""Shortest and longest T that is proposed."""
_SHARD_BYTES = 256 * 2**20
_FEWEST_UNITS = 20
# The quickstart, whose figures are in the README, has 43 rows per latent and 1.4 million in all its epochs.
_ROWS_PER_LATENT = 25
_ROWS_TRAINED = 1_400_000
_MOST_EPOCHS = 8


@dataclass(frozen=True)
class Model:
    """A subject as `winnow init` sees it, without its weights."""

    name: str
    layers: int
    width: int
    context_limit: int | None


@dataclass(frozen=True)
class Draft:
    """The proposed values, and what they follow from."""

    model: Model
    survey: Survey
    hook: str
    context_length: int
    windows_per_unit: int
    train_units: int | None
    """None: the whole corpus."""
    units: int
    """The expected number of training units."""
    validation_units: int
    latents: int
    k: int
    batch_rows: int
    epochs: int

    @property
    def rows(self) -> int:
        """Training rows."""
        return self.units * self.windows_per_unit * (self.context_length - 1)


def draft(model: Model, survey: Survey, hook: str | None, tokens: int | None) -> Draft:
    """Choose the values.

    Args:
        model: The subject.
        survey: The corpus.
        hook: The hook; None is the residual stream after the middle layer.
        tokens: Most tokens to harvest; None is `DEFAULT_TOKENS`.

    Raises:
        ConfigError: The corpus is too small for one training and one held-out unit.
    """
    most = tokens or DEFAULT_TOKENS
    # A tenth of the estimate is kept back: a plan that asks for more than there is would be refused.
    likely = most if survey.tokens is None else int(survey.tokens * (1.0 if survey.whole else 0.9))
    budget = min(most, likely)
    length = _context(survey.median_tokens, budget, model.context_limit)
    windows = budget // length
    shard = _SHARD_BYTES // (2 * model.width * (length - 1))
    size = max(SLICES, min(shard, windows // _FEWEST_UNITS, 1024) // SLICES * SLICES)
    held = max(1, min(8, windows // size // 50))
    units = windows // size - held
    if units < 1:
        raise ConfigError(
            "the corpus is too small",
            expected=f"at least {2 * size * length:,} tokens: {size} windows of {length} to train on, and as "
            "many held out",
            got=f"about {budget:,}",
            fix="Add text" if tokens is None or tokens >= likely else "Raise --tokens, or add text",
        )
    rows = units * size * (length - 1)
    latents = 2 ** round(math.log2(8 * model.width))
    while latents > 2 * model.width and rows < _ROWS_PER_LATENT * latents:
        latents //= 2
    epochs = max(1, min(_MOST_EPOCHS, math.ceil(_ROWS_TRAINED / rows)))
    trained = rows * epochs
    return Draft(
        model=model,
        survey=survey,
        hook=hook or f"resid_post.{(model.layers - 1) // 2}",
        context_length=length,
        windows_per_unit=size,
        # The whole corpus is left to the plan, which counts: an estimate may be above what there is.
        train_units=units if likely > most else None,
        units=units,
        validation_units=held,
        latents=latents,
        k=max(1, min(32 if model.width < 2048 else 64, latents // 8)),
        batch_rows=4096 if trained >= 20_000_000 else 2048 if trained >= 1_000_000 else 512,
        epochs=epochs,
    )


def _context(median: int, tokens: int, limit: int | None) -> int:
    """The power of two nearest to the median document, within `_CONTEXTS` and the model's limit."""
    length = max(_CONTEXTS[0], min(2 ** round(math.log2(max(median, 1))), _CONTEXTS[1]))
    # Shorter windows of little text: a unit has 64 at least, and of few units one held out is a large share.
    while length > _CONTEXTS[0] and tokens < _FEWEST_UNITS * SLICES * length:
        length //= 2
    return max(8, min(length, limit or length))


def config_text(found: Draft, root: str, out: str) -> str:
    """The config as YAML with comments; see `winnow init`."""
    model, survey = found.model, found.survey
    limit = f", at most {model.context_limit:,} tokens" if model.context_limit else ""
    held = f"about {survey.tokens:,} tokens in {_files(survey)}" if survey.tokens else _files(survey)
    if survey.whole and survey.tokens:
        held = held.removeprefix("about ")
    lines = [
        f"# {model.name}: {count_of(model.layers, 'layer')} of width {model.width}{limit}.",
        f"# The corpus: {held}; the median document has {survey.median_tokens:,}.",
        "# Any value can be overridden: --set train.latents=8192",
        _line(f"root: {quoted(root)}", "the dataset: a folder, or s3://bucket/prefix"),
        "",
        "subject:",
        _line(f"  model: {quoted(model.name)}", "hub id, folder or .gguf file"),
        "",
        "corpus:",
    ]
    if survey.corpus.max_document_chars != _default(survey, "max_document_chars"):
        lines.append(
            _line(
                f"  max_document_chars: {survey.corpus.max_document_chars}",
                "few long documents: cut, so that whole ones can be held out",
            )
        )
    lines.append("  sources:")
    for source in survey.corpus.sources:
        lines.append(f"    - uri: {quoted(source.uri)}")
        if source.format != "auto":
            lines.append(f"      format: {source.format}")
        if "column" in source.model_fields_set:
            lines.append(f"      column: {quoted(source.column)}")
        if source.template is not None:
            lines.append(f"      template: {quoted(source.template)}")
    whole = "null" if found.train_units is None else str(found.train_units)
    tokens = found.units * found.windows_per_unit * found.context_length
    amount = f"about {found.rows:,} rows"
    note = f"the whole corpus: {amount}" if found.train_units is None else f"{amount} of {tokens:,} tokens"
    lines += [
        "",
        "plan:",
        _line(f"  hooks: [{found.hook}]", _hook_note(found)),
        _line(f"  context_length: {found.context_length}", "tokens per window; the model sees no further"),
        _line(f"  windows_per_unit: {found.windows_per_unit}", "a unit is computed and stored at once"),
        _line(f"  train_units: {whole}", note),
        _line(f"  validation_units: {found.validation_units}", "held-out documents, for every figure"),
        "",
        "train:",
        f"  out: {quoted(out)}",
        f"  hook: {found.hook}",
        _line(f"  latents: {found.latents}", f"{found.latents / model.width:.2g} x the width"),
        _line(f"  k: {found.k}", "active per row; 16 to 64 is usual, more is closer and less sparse"),
    ]
    if survey.chat:
        lines += [
            "  # The same harvest also serves an SAE of what the assistant says only:",
            "  # rows: {roles: [assistant], special: false}",
        ]
    lines += [
        f"  batch_rows: {found.batch_rows}",
        _line(f"  epochs: {found.epochs}", f"{found.rows * found.epochs:,} rows in all"),
    ]
    return "\n".join(lines) + "\n"


def _hook_note(found: Draft) -> str:
    middle = f"resid_post.{(found.model.layers - 1) // 2}"
    return "the residual stream after the middle layer" if found.hook == middle else "as asked for"


def _files(survey: Survey) -> str:
    return count_of(survey.files, "file")


def _default(survey: Survey, name: str) -> Any:
    return type(survey.corpus).model_fields[name].default


def _line(text: str, comment: str) -> str:
    """A line with its comment in a column of its own."""
    return f"{text.ljust(33)} # {comment}"


def quoted(text: str) -> str:
    """A YAML scalar of a text: bare if that reads as the same text, otherwise in quotation marks."""
    # Asked of the reader itself: `true`, `.5`, `None` and `*.txt` are no texts if they are bare.
    try:
        bare = parse_value(text, "") == text
    except ConfigError:
        bare = False
    plain = text.isascii() and not any(each.isspace() or each in "#,[]{}" for each in text)
    return text if bare and plain else yaml.safe_dump(text, default_style='"', width=math.inf).strip()
