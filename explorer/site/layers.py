"""A transcoder set as the explorer shows it: every layer that is indexed as an SAE of its own."""

from __future__ import annotations

import logging
from typing import NamedTuple

from winnow.explorer.index.table import INDEX_KEY
from winnow.explorer.place import default_index
from winnow.sae.sets import SET_KEY
from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import ConfigError
from winnow.schemas.sets import SetCard
from winnow.store.objects import ObjectStore, open_store

log = logging.getLogger("winnow.explorer")


class OpenSet(NamedTuple):
    """A published set whose layers are not loaded."""

    uri: str
    store: ObjectStore
    card: SetCard


def open_set(uris: list[str], index: list[str] | None, storage: StorageSpec) -> OpenSet | None:
    """The transcoder set at one of these addresses; None if all of them are SAEs.

    Raises:
        ConfigError: It is shown beside something else, or with an index elsewhere.
    """
    stores = [(uri.rstrip("/"), open_store(uri, storage)) for uri in uris]
    sets = [(uri, store) for uri, store in stores if store.size(SET_KEY) is not None]
    if not sets:
        return None
    if len(uris) > 1 or index:
        raise ConfigError(
            f"{sets[0][0]} is a transcoder set",
            expected="a set alone, indexed beside its layers",
            got=f"{len(uris)} addresses and {len(index or [])} of --index",
        )
    uri, store = sets[0]
    return OpenSet(uri, store, SetCard.from_json(store.get(SET_KEY), origin=f"{uri}/{SET_KEY}"))


def indexed_layers(of: OpenSet, storage: StorageSpec) -> dict[int, str]:
    """Layer -> address of its transcoder, of the layers that have an index."""
    found: dict[int, str] = {}
    for entry in of.card.layers:
        sae = f"{of.uri}/{entry.folder}"
        if open_store(default_index(sae), storage).size(INDEX_KEY) is not None:
            found[entry.layer] = sae
    missing = [entry.layer for entry in of.card.layers if entry.layer not in found]
    if missing:
        log.warning(
            "explorer: layers %s of %s are not indexed: their latents are shown without examples; "
            "`winnow index %s` makes the indexes",
            ", ".join(map(str, missing)),
            of.uri,
            of.uri,
        )
    return found
