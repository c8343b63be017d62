"""What a latent does to the model's predictions: replies about ablation and steering."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from winnow.explorer.site.bodies import AblateBody, PromotionBody
from winnow.explorer.site.desk import Desk
from winnow.explorer.site.exhibit import Exhibit
from winnow.explorer.site.monitor import MAX_TOKENS
from winnow.explorer.site.reading import Ablation, ablate, read_tokens, tokenise
from winnow.explorer.site.steered import promotion
from winnow.schemas.errors import ConfigError
from winnow.store.read.joined import JoinedStore

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
        ConfigError: No such latent, neither text nor window, both, a text of unsuitable length, or a
            crosscoder without the part.
    """
    exhibit = desk.exhibit(sae)
    place = exhibit.place("an ablation", body.part)
    desk.latent(exhibit, body.latent)
    if (body.text is None) == (body.window is None):
        raise ConfigError("text, window", expected="one of the two", got="both or neither")

    def compute() -> dict[str, Any]:
        with desk.lane.visit():
            subject = desk.model(place.subject)
            if body.text is not None:
                ids, told = tokenise(subject, body.text, MAX_TOKENS, exhibit.window), {}
            else:
                ids, told = _window(desk, body.window or 0)
            meta, own = exhibit.table.meta, exhibit.sae(subject.device)
            reading = read_tokens(
                desk.readers(exhibit),
                own,
                ids,
                drop_leading=meta.drop_leading,
                sink_multiple=meta.sink_multiple,
                positions=told,
            )
            found = ablate(
                subject,
                own,
                reading,
                body.latent,
                drop_leading=meta.drop_leading,
                positions=told.get(place.subject),
                part=place.part,
            )
        return _described(exhibit, ids, found)

    return desk.once(("ablation", sae, body.latent, body.text, body.window, place.part), compute)


def measured_promotion(desk: Desk, sae: int, body: PromotionBody) -> dict[str, Any]:
    """What a latent promotes when it is clamped on windows of the dataset, beside the direct path's tokens.

    Raises:
        ConfigError: No such latent, the dataset is not available, or a crosscoder without the part.
    """
    exhibit = desk.exhibit(sae)
    place = exhibit.place("a measurement of what steering promotes,", body.part)
    row = exhibit.table.latent(desk.latent(exhibit, body.latent))
    meta = exhibit.table.meta
    strength = row["largest"] if body.strength is None else body.strength

    def compute() -> dict[str, Any]:
        # Of several SAEs one may be indexed on another dataset: any windows do, if they exist.
        there = min(meta.windows, desk.dataset().plan.windows) if desk.dataset else meta.windows
        count = min(_STEERED_WINDOWS, there)
        drawn = np.sort(np.random.default_rng(0).choice(there, count, replace=False))
        with desk.lane.visit():
            subject = desk.model(place.subject)
            read = [_window(desk, int(number), _STEERED_TOKENS) for number in drawn]
            found = promotion(
                subject,
                exhibit.sae(subject.device),
                [ids for ids, _ in read],
                body.latent,
                strength,
                drop_leading=meta.drop_leading,
                positions=[told[place.subject] for _, told in read],
                part=place.part,
                codes=_codes(desk, exhibit, body.latent, read) if place.part else None,
            )
        # The LM's head may have more rows than the tokenizer has tokens; those have no text.
        found = found._replace(change=found.change[: len(exhibit.table.texts)])
        up, down = found.extremes(meta.spec.logits or _PROMOTED)
        # Of a crosscoder each part has its own: `promoted_ids` are those of the longest decoder row.
        end = f"_{[one.hook for one in meta.parts].index(place.part)}" if place.part else ""
        ids, scores = (row.get(f"promoted_{name}{end}", []) for name in ("ids", "logits"))
        direct = zip(ids, scores, strict=True)
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

    return desk.once(("promotion", sae, body.latent, strength, place.part), compute)


def _codes(
    desk: Desk, exhibit: Exhibit, latent: int, windows: list[tuple[list[int], dict[str, Any]]]
) -> list[Tensor]:
    """Codes [T] of a crosscoder's latent on windows, at sinks too: the latent is clamped there as well."""
    subjects, drop = desk.readers(exhibit), exhibit.table.meta.drop_leading
    own = exhibit.sae(next(iter(subjects.values())).device)
    fields: dict[str, Any] = {"drop_leading": drop, "sink_multiple": float("inf")}
    return [read_tokens(subjects, own, ids, positions=told, **fields).of(latent) for ids, told in windows]


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


def _window(desk: Desk, window: int, most: int | None = None) -> tuple[list[int], dict[str, Any]]:
    """The first tokens of a window of the dataset, and their positions [1, T] in each subject, by name.

    Positions are None unless attention stays inside documents.
    """
    if desk.dataset is None:
        raise ConfigError("window", expected="the dataset", got="nothing: the dataset is not available")
    dataset = desk.dataset()
    parts = dataset.parts if isinstance(dataset, JoinedStore) else {"": dataset}
    found = {name: part.positions([window]) for name, part in parts.items()}
    told = {name: None if at is None else at[:, :most] for name, at in found.items()}
    return [int(token) for token in dataset.tokens(window)[:most]], told


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
