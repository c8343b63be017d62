"""Explanations that `winnow evaluate` left beside an SAE, put in words: its n-grams. Pure."""

from __future__ import annotations

from typing import Any

from schemas.errors import WinnowError
from schemas.evaluation import Evaluation
from schemas.features import Explanation

SHOWN = 3
"""N-grams quoted for a latent, the most frequent first."""


def from_evaluation(evaluation: Evaluation) -> list[Explanation]:
    """An explanation for every latent whose n-grams stand in the evaluation.

    The score is the n-grams' precision on held-out windows. Entries of another form are left out: the
    details of an evaluation are for reading, not a contract.
    """
    family = evaluation.families.get("n2g")
    entries: Any = family.details.get("latents", []) if family else []
    found: list[Explanation] = []
    for entry in entries if isinstance(entries, list) else []:
        try:
            found.append(_one(entry))
        except (KeyError, TypeError, ValueError, WinnowError):
            continue
    return [each for each in found if each.latent < evaluation.latents]


def _one(entry: dict[str, Any]) -> Explanation:
    patterns = sorted(entry["patterns"], key=lambda pattern: -pattern["examples"])[:SHOWN]
    quoted = [
        "".join("…" if token is None else token for token in pattern["tokens"]).strip("\n")
        for pattern in patterns
    ]
    text = "fires at the end of " + " or ".join(f"“{each}”" for each in quoted if each)
    precision = entry["precision"]
    score = None if precision is None else round(float(precision), 3)
    return Explanation(latent=entry["latent"], text=text[:2000], source="n2g, precision", score=score)
