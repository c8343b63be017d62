"""What `winnow info` shows of an SAE and of a transcoder set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from winnow.cli.console import print_table
from winnow.common.figures import human_bytes, human_figure

if TYPE_CHECKING:
    from winnow.schemas.sets import SetCard
    from winnow.schemas.training import SaeCard
    from winnow.store.objects import ObjectStore


def describe_sae(store: ObjectStore) -> dict[str, Any]:
    """Read an SAE's card, without its weights.

    Returns:
        JSON: `sae` (its card), `bytes` of the weights.

    Raises:
        IntegrityError, UnsupportedVersion: The card cannot be read.
    """
    from winnow.schemas.sets import CARD_KEY, WEIGHTS_KEY
    from winnow.schemas.training import SaeCard

    card = SaeCard.from_json(store.get(CARD_KEY), origin=f"{store.uri}/{CARD_KEY}")
    return {"sae": card.model_dump(mode="json"), "bytes": store.size(WEIGHTS_KEY) or 0}


def show_sae(uri: str, value: dict[str, Any]) -> None:
    """Print what `describe_sae` returned."""
    from winnow.schemas.training import SaeCard

    card = SaeCard.model_validate(value["sae"])
    facts: list[tuple[str, object]] = [("reads", ", ".join(card.input_hooks))]
    if card.target_hooks:
        facts.append(("predicts", ", ".join(card.target_hooks)))
    facts += [
        ("latents", f"{card.latents:,}"),
        ("activation", f"{card.parts.activation}, K = {card.k}"),
        ("width", f"D = {card.d_model:,}"),
        ("normalisation", card.normalize),
        ("weights", f"{card.weights}, {human_bytes(value['bytes'])}"),
    ]
    if card.identity:
        facts.append(("subject", card.identity.subject_model))
        facts.append(("trained on", f"plan {card.identity.plan_fingerprint[:16]}..."))
    if not card.rows.everything:
        facts.append(("rows", card.rows.model_dump_json(exclude_defaults=True)))
    facts += [(name, human_figure(figure)) for name, figure in card.metrics.items()]
    facts += [("note", note) for note in card.notes]
    print_table(uri, facts)


def describe_set(store: ObjectStore) -> dict[str, Any]:
    """Read a set's card and those of its layers, without any weights.

    Returns:
        JSON: `set` (its card), `layers` (layer -> its card), `bytes` of all weights.

    Raises:
        MissingObject, IntegrityError: A layer's card is missing or not the one that the set names.
    """
    from winnow.sae.sets import layer_card
    from winnow.schemas.sets import SET_KEY, WEIGHTS_KEY, SetCard

    card = SetCard.from_json(store.get(SET_KEY), origin=f"{store.uri}/{SET_KEY}")
    layers = {entry.layer: layer_card(store, entry) for entry in card.layers}
    size = sum(store.size(f"{entry.folder}/{WEIGHTS_KEY}") or 0 for entry in card.layers)
    return {
        "set": card.model_dump(mode="json"),
        "layers": {str(layer): each.model_dump(mode="json") for layer, each in layers.items()},
        "bytes": size,
    }


def show_set(uri: str, value: dict[str, Any]) -> None:
    """Print what `describe_set` returned."""
    from winnow.schemas.sets import SetCard
    from winnow.schemas.training import SaeCard

    card = SetCard.model_validate(value["set"])
    layers = {int(layer): SaeCard.model_validate(each) for layer, each in value["layers"].items()}
    print_table(uri, _facts(card, layers[card.layers[0].layer], value["bytes"]))
    # Figures that all layers have, such as their own FVU.
    names = list(dict.fromkeys(name for each in layers.values() for name in each.metrics))
    rows = [
        [
            str(layer),
            each.hook,
            " to ".join(dict.fromkeys((each.target_hooks[0], each.target_hooks[-1]))),
            f"{each.latents:,}",
            str(each.k),
            *(human_figure(each.metrics[name]) if name in each.metrics else "" for name in names),
        ]
        for layer, each in layers.items()
    ]
    print_table("layers", rows, header=("layer", "reads", "writes", "latents", "K", *names))


def _facts(card: SetCard, first: SaeCard, size: int) -> list[tuple[str, object]]:
    """The lines about the whole set."""
    facts: list[tuple[str, object]] = [
        ("kind", "cross-layer transcoders" if card.cross else "per-layer transcoders"),
        ("layers", f"{card.layers[0].layer} to {card.layers[-1].layer}"),
        ("activation", first.parts.activation),
        ("width", f"D = {first.d_model:,}"),
        ("weights", f"{card.weights}, {human_bytes(size)}"),
    ]
    if card.identity:
        facts.append(("subject", card.identity.subject_model))
        facts.append(("trained on", f"plan {card.identity.plan_fingerprint[:16]}..."))
    facts += [(name, human_figure(figure)) for name, figure in card.metrics.items()]
    facts += [("note", note) for note in card.notes]
    return facts
