"""A transcoder set for the explorer, at toy size: a harvest of a tiny subject, a random set, its indexes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.evaluated import toy_config
from tests.support.sets import publish_set
from winnow.explorer.index.make import make_indexes
from winnow.explorer.place import Place
from winnow.schemas.config import Config
from winnow.schemas.features import IndexSpec
from winnow.schemas.layers import SetSpec
from winnow.schemas.sets import SET_KEY, SetCard
from winnow.store.objects import open_store

LAYERS, LATENTS = 3, 32
# Ten bands of 16 draws: of a latent that fires 160 times at most, every activation is drawn.
SPEC = IndexSpec(top=2, bands=10, per_band=16, before=3, after=3, logits=0, neighbours=2 * LATENTS)


def layers_dataset(folder: Path) -> Config:
    """Harvest all that sets of either kind read and predict; returns the config."""
    ends = (0, LAYERS - 1)
    hooks = {hook for reads in ("resid_mid", "mlp_in") for hook in SetSpec(layers=ends, reads=reads).hooks}
    return toy_config(folder, plan={"hooks": sorted(hooks)}, units=1)


def place_of(config: Config) -> Place:
    """Where the dataset and the subject are."""
    return Place(config.root, config.subject, config.storage)


def indexed_set(config: Config, folder: Path, **how: Any) -> str:
    """Publish a random set, as `publish_set` does, and index it; returns its address."""
    uri = publish_set(config, folder, layers=LAYERS, **how)
    card = SetCard.from_json(open_store(uri).get(SET_KEY), origin=uri)
    make_indexes(uri, card, place_of(config), None, None, SPEC)
    return uri
