"""What a latent does to the model's predictions: replies about ablation and steering."""

from __future__ import annotations

from typing import Any

import numpy as np

from winnow.explorer.site.bodies import AblateBody, PromotionBody
from winnow.explorer.site.desk import Desk
from winnow.explorer.site.exhibit import Exhibit
from winnow.explorer.site.monitor import MAX_TOKENS
from winnow.explorer.site.reading import Ablation, ablate, read_tokens, tokenise
from winnow.explorer.site.steered import promotion
from winnow.schemas.errors import ConfigError

# Together no more tokens than one text may have. The same windows for all latents of an SAE.
_STEERED_WINDOWS, _STEERED_TOKENS = 8, 64
"""Windows on which steering is measured, and the tokens that are read of each."""
_PROMOTED = 12
"""Tokens listed that steering raises most, if the index does not say how many."""
_RELATED = 12
"""Latents listed of other layers, if the index does not say how many."""


def ablation(desk: Desk, sae: int, body: AblateBody) -> dict[str, Any]:
    """The effects of one latent on one text, computed or from the cache.

    Raises:
        ConfigError: No such latent, neither text nor window, both, or a text of unsuitable length.
    """
    exhibit = desk.exhibit(sae)
    exhibit.require_one_hook("an ablation")
    desk.latent(exhibit, body.latent)
    if (body.text is None) == (body.window is None):
        raise ConfigError("text, window", expected="one of the two", got="both or neither")

    def compute() -> dict[str, Any]:
        with desk.lane.visit():
            subject = desk.model()
            if body.text is not None:
                ids, positions = tokenise(subject, body.text, MAX_TOKENS, exhibit.window), None
            else:
                ids, positions = _window(desk, body.window or 0)
            meta, own = exhibit.table.meta, exhibit.sae(subject.device)
            common: dict[str, Any] = {"drop_leading": meta.drop_leading, "positions": positions}
            reading = read_tokens(subject, own, ids, sink_multiple=meta.sink_multiple, **common)
            found = ablate(subject, own, reading, body.latent, **common)
        return _described(exhibit, ids, found)

    return desk.once(("ablation", sae, body.latent, body.text, body.window), compute)


def measured_promotion(desk: Desk, sae: int, body: PromotionBody) -> dict[str, Any]:
    """What a latent promotes when it is clamped on windows of the dataset, beside the direct path's tokens.

    Raises:
        ConfigError: No such latent, or the dataset is not available.
    """
    exhibit = desk.exhibit(sae)
    exhibit.require_one_hook("a measurement of what steering promotes,")
    row = exhibit.table.latent(desk.latent(exhibit, body.latent))
    meta = exhibit.table.meta
    strength = row["largest"] if body.strength is None else body.strength

    def compute() -> dict[str, Any]:
        # Of several SAEs one may be indexed on another dataset: any windows do, if they exist.
        there = min(meta.windows, desk.dataset().plan.windows) if desk.dataset else meta.windows
        count = min(_STEERED_WINDOWS, there)
        drawn = np.sort(np.random.default_rng(0).choice(there, count, replace=False))
        with desk.lane.visit():
            subject = desk.model()
            read = [_window(desk, int(number)) for number in drawn]
            found = promotion(
                subject,
                exhibit.sae(subject.device),
                [ids[:_STEERED_TOKENS] for ids, _ in read],
                body.latent,
                strength,
                drop_leading=meta.drop_leading,
                positions=[None if at is None else at[:, :_STEERED_TOKENS] for _, at in read],
            )
        # The LM's head may have more rows than the tokenizer has tokens; those have no text.
        found = found._replace(change=found.change[: len(exhibit.table.texts)])
        up, down = found.extremes(meta.spec.logits or _PROMOTED)
        direct = zip(row.get("promoted_ids", []), row.get("promoted_logits", []), strict=True)
        best = {token for token, _ in up}
        return {
            "strength": strength,
            "windows": count,
            "positions": found.positions,
            "kl": round(found.kl, 6),
            "up": exhibit.pairs(up),
            "down": exhibit.pairs(down),
            "direct": [
                {
                    "token": exhibit.table.texts[token],
                    "id": token,
                    "score": score,
                    "change": round(float(found.change[token]), 6),
                    "rank": found.rank(token),
                    "shared": token in best,
                }
                for token, score in direct
            ],
        }

    return desk.once(("promotion", sae, body.latent, strength), compute)


def related(desk: Desk, sae: int, latent: int) -> dict[str, Any]:
    """The latents of other layers of a set that feed a latent, and those that it feeds.

    Raises:
        ConfigError: No such latent, or the site shows no set.
    """
    exhibit = desk.exhibit(sae)
    desk.latent(exhibit, latent)
    relations = desk.relations
    if relations is None:
        raise ConfigError(
            "latents of other layers",
            expected="a transcoder set, whose layers write to what later ones read",
            got="single SAEs",
            fix="Start it as `winnow explore SET`",
        )
    layer = next(layer for layer, number in desk.circuits.layers.items() if number == sae)

    def compute() -> dict[str, Any]:
        # It takes seconds of all cores, and the subject of a set that reads `mlp_in`.
        with desk.lane.visit():
            return relations.of(layer, latent, exhibit.table.meta.spec.neighbours or _RELATED)

    return desk.once(("relations", sae, latent), compute) | {"missing": list(desk.circuits.unindexed)}


def _window(desk: Desk, window: int) -> tuple[list[int], Any]:
    """Tokens of a window of the dataset, and their positions if attention stays inside documents."""
    if desk.dataset is None:
        raise ConfigError("window", expected="the dataset", got="nothing: the dataset is not available")
    dataset = desk.dataset()
    return [int(token) for token in dataset.tokens(window)], dataset.positions([window])


def _described(exhibit: Exhibit, ids: list[int], found: Ablation) -> dict[str, Any]:
    texts = exhibit.table.texts

    def votes(pairs: list[tuple[int, float]]) -> list[dict[str, Any]]:
        return [{"token": texts[number], "change": round(change, 6)} for number, change in pairs]

    return {
        "tokens": exhibit.words(ids),
        "values": [round(value, 5) for value in found.activation],
        # None at the last token: what comes after it is unknown.
        "loss_change": [None if each is None else round(each, 6) for each in found.loss_change],
        "kl": [round(each, 6) for each in found.kl],
        "up": [votes(each) for each in found.up],
        "down": [votes(each) for each in found.down],
    }
