"""`python -m winnow.evaluator.explanations`: a page of N2G explanations, and the text that latents fire on.

It shows the first latents of an `evaluation.json`, their top windows from the dataset, and the remarks of a
reader, one per latent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from winnow.cli.console import guard
from winnow.common.reporter import say
from winnow.common.yaml_text import parse_yaml
from winnow.evaluator.report import EVALUATION_KEY, require_evaluation
from winnow.evaluator.setting import subject_spec_of
from winnow.schemas.errors import ConfigError
from winnow.schemas.evaluation import Evaluation, Figure
from winnow.store import ActivationStore
from winnow.subject.load import Subject

BEFORE, AFTER = 14, 4
"""Tokens shown around the one on which a latent is active: more before it, since the model has read only
those."""
_SHOWN_PATTERNS = 6


def main(
    evaluated: Annotated[str, typer.Argument(help=f"Folder or URI that contains {EVALUATION_KEY}.")],
    root: Annotated[str, typer.Option(help="The dataset that it was measured on.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("docs/results/explanations.md"),
    latents: Annotated[int, typer.Option(min=1, help="Number of latents: the first of the sample.")] = 10,
    remarks: Annotated[Path | None, typer.Option(help="YAML file: latent -> remark, and `summary`.")] = None,
) -> None:
    """Write a page of N2G explanations beside the text on which their latents are active.

    Example: `python -m winnow.evaluator.explanations runs/quickstart --root data/quickstart`
    """
    with guard():
        stored = require_evaluation(evaluated)
        dataset = ActivationStore.open(root)
        evaluation = stored.on(dataset.plan.fingerprint)
        if evaluation is None:
            raise ConfigError("--root", expected="a dataset of the evaluation", got="another one")
        # Only the tokenizer is needed; `until` keeps the blocks above the hook from being loaded for it.
        tokenizer = Subject.load(subject_spec_of(dataset.plan), until=[evaluation.hook]).tokenizer
        notes = _read_remarks(remarks)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page(evaluation, dataset, tokenizer, latents, notes), encoding="utf-8")
        say(f"written: {out}")


def _read_remarks(path: Path | None) -> dict[str, str]:
    """Read remarks by latent (as text) and `summary`; raise ConfigError if the file is not such a mapping."""
    if path is None:
        return {}
    raw, _ = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}", expected="a mapping from latent to remark", got=type(raw).__name__)
    return {str(key): str(value).strip() for key, value in cast("dict[Any, Any]", raw).items()}


def page(
    evaluation: Evaluation, dataset: ActivationStore, tokenizer: Any, count: int, remarks: dict[str, str]
) -> str:
    """Write the page as Markdown.

    Raises:
        ConfigError: Family `n2g` was not measured.
    """
    family = evaluation.families.get("n2g")
    if family is None:
        raise ConfigError("family n2g", expected="its results in the evaluation", got="none")
    # The first ones: latents were drawn at random when they were explained, so none is picked for looking
    # good.
    shown = family.details["latents"][:count]
    lines = [
        "# Explanations of latents, and what the latents fire on",
        "",
        "Written by `python -m winnow.evaluator.explanations` from the evaluation of an SAE of "
        f"`{evaluation.hook}` of {evaluation.subject_model} (N = {evaluation.latents:,}, "
        f"K = {evaluation.k}, weights `{evaluation.sae_sha256[:12]}`). "
        f"The latents are the first {len(shown)} of a random sample; none was selected by hand. "
        "Definitions: [evaluation.md](../evaluation.md).",
        "",
        f"The whole sample: precision {_told(evaluation, 'n2g_precision')}, recall "
        f"{_told(evaluation, 'n2g_recall')}; {family.notes[0]}.",
        "",
        "In n-grams `▢` is any token and `·` a space. In a window the token on which the latent fires is in "
        "**bold**.",
        "",
    ]
    if "summary" in remarks:
        lines += [remarks["summary"], ""]
    lines += ["| latent | density | precision | recall | explanation |", "|---|---|---|---|---|"]
    lines += [
        f"| {fact['latent']} | {fact['density']:.2%} | {_share(fact['precision'], fact['firings'])} | "
        f"{_share(fact['recall'], fact['positives'])} | {', '.join(patterns(fact)[:3]) or 'none'} |"
        for fact in shown
    ]
    for fact in shown:
        lines += section(fact, dataset, tokenizer, remarks.get(str(fact["latent"])))
    return "\n".join(lines) + "\n"


def section(fact: dict[str, Any], dataset: ActivationStore, tokenizer: Any, remark: str | None) -> list[str]:
    """Write the section of one latent: its n-grams, windows and remark."""
    lines = ["", f"## Latent {fact['latent']}", "", f"N-grams: {', '.join(patterns(fact)) or 'none'}.", ""]
    for place in fact["top"]:
        text = _window_text(dataset.tokens(place["window"]).tolist(), place["position"], tokenizer)
        lines.append(f"- {place['value']:.3f}, window {place['window']}: {text}")
    if remark:
        lines += ["", f"*Remark:* {remark}"]
    return lines


def patterns(fact: dict[str, Any]) -> list[str]:
    """List a latent's n-grams with their values, the highest first."""
    return [
        f"`{''.join('▢' if token is None else _visible(token) for token in entry['tokens'])}`"
        f" ({entry['value']:.2f})"
        for entry in fact["patterns"][:_SHOWN_PATTERNS]
    ]


def _window_text(ids: list[int], position: int, tokenizer: Any) -> str:
    """Render the tokens around a position on one line of Markdown, that one in bold."""
    first, stop = max(position - BEFORE, 0), position + AFTER + 1
    # Runs of tokens are decoded together: a character may be made of the bytes of several.
    before, after = (
        _plain(tokenizer.decode(part)) for part in (ids[first:position], ids[position + 1 : stop])
    )
    here = _plain(tokenizer.decode([ids[position]]))
    # A token's leading space goes before the asterisks: Markdown takes `** word**` for plain text.
    bold = here.strip() or "␣"
    left = " " if here.startswith(" ") else ""
    return f"{'… ' if first else ''}{before}{left}**{bold}**{after} …"


def _plain(text: str) -> str:
    # The corpus is prose of any kind; none of it may become Markdown or HTML on the page.
    out = text.replace("\n", " ⏎ ")
    for sign in "\\`*_[]<>|#":
        out = out.replace(sign, f"\\{sign}")
    return out


def _visible(text: str) -> str:
    # N-grams stand in code spans inside a table, where a backquote or a bar cannot be escaped.
    return text.replace(" ", "·").replace("\n", "⏎").replace("`", "'").replace("|", "¦")


def _share(value: float | None, samples: int) -> str:
    return f"none of {samples}" if value is None else f"{value:.2f} of {samples}"


def _told(evaluation: Evaluation, id: str) -> str:
    figure: Figure | None = evaluation.figure(id)
    if figure is None or figure.value is None or figure.low is None or figure.high is None:
        return "not known"
    return f"{figure.value:.2f} [{figure.low:.2f} … {figure.high:.2f}]"


if __name__ == "__main__":
    typer.run(main)
