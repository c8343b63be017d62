"""Explanations from the evaluation beside an SAE: n-grams put in words, a judge's sentences. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from winnow.schemas.errors import WinnowError
from winnow.schemas.evaluation import Evaluation, Family
from winnow.schemas.features import Explanation

SHOWN = 3
"""N-grams quoted per latent, the most frequent first."""


def from_evaluation(evaluation: Evaluation) -> list[Explanation]:
    """An explanation for every latent whose n-grams or judged sentence the evaluation contains.

    The score is the n-grams' precision on held-out windows, or the sentence's detection score. Entries of
    another form are left out.
    """
    found: list[Explanation] = []
    # The judge's sentence first: pages label a latent with its first explanation.
    readers: dict[Family, Callable[[dict[str, Any]], Explanation]] = {"judge": _judged, "n2g": _ngrams}
    for name, read in readers.items():
        family = evaluation.families.get(name)
        entries: Any = family.details.get("latents", []) if family else []
        for entry in entries if isinstance(entries, list) else []:
            # An evaluation's details are for reading, not a contract: those of an older or newer Winnow may
            # have another form, and a site without their explanations is better than none.
            try:
                found.append(read(entry))
            except (KeyError, TypeError, ValueError, WinnowError):
                continue
    return [each for each in found if each.latent < evaluation.latents]


def _judged(entry: dict[str, Any]) -> Explanation:
    score = None if entry["detection"] is None else round(float(entry["detection"]), 3)
    return Explanation(latent=entry["latent"], text=entry["text"], source="judge, detection", score=score)


def _ngrams(entry: dict[str, Any]) -> Explanation:
    # A wildcard is stored as None. Newlines at the ends are cut, since a quotation is one line of a page.
    patterns = sorted(entry["patterns"], key=lambda pattern: -pattern["examples"])[:SHOWN]
    quoted = [
        "".join("…" if token is None else token for token in pattern["tokens"]).strip("\n")
        for pattern in patterns
    ]
    text = "fires at the end of " + " or ".join(f"“{each}”" for each in quoted if each)
    precision = entry["precision"]
    score = None if precision is None else round(float(precision), 3)
    return Explanation(latent=entry["latent"], text=text[:2000], source="n2g, precision", score=score)
