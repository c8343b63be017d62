"""Import and export of transcoder sets by format name.

::

    import_set("theirs", "circuit-tracer", "runs/set")         # a set that `TranscoderSet.load` reads
    export_set("runs/set", "circuit-tracer", "exported")
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from winnow.sae.formats import circuit_tracer, clt_forge, gemma_scope_sets
from winnow.sae.formats.convert import choose, require_free
from winnow.sae.formats.raw import RawSet, unfold
from winnow.sae.formats.thresholds import LayerCost, with_thresholds
from winnow.sae.model import CARD_KEY
from winnow.sae.sets import SET_KEY, TranscoderSet, hooks_of_layer, put_set_card
from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import ConfigError
from winnow.schemas.layers import Reads, SetSpec, layer_folder
from winnow.schemas.sets import SetCard
from winnow.schemas.training import SaeCard
from winnow.store.objects import open_store

log = logging.getLogger("winnow.sae")
SET_READERS: Mapping[str, Callable[[Path, Reads | None], RawSet]] = {
    circuit_tracer.NAME: circuit_tracer.read,
    gemma_scope_sets.NAME: gemma_scope_sets.read,
    clt_forge.NAME: clt_forge.read,
}
SET_WRITERS: Mapping[str, Callable[[TranscoderSet, Path, str | None], None]] = {
    circuit_tracer.NAME: circuit_tracer.write,
    clt_forge.NAME: clt_forge.write,
}
_CHECKS: Mapping[str, Callable[[SetSpec, str], None]] = {
    circuit_tracer.NAME: circuit_tracer.check,
    clt_forge.NAME: clt_forge.check,
}


@dataclass(frozen=True)
class Exported:
    """What `export_set` wrote."""

    files: tuple[Path, ...]
    """Sorted."""
    cost: dict[int, LayerCost]
    """Layer -> what thresholds in place of TopK change; empty if none were set."""


def import_set(
    source: Path,
    format_name: str,
    out: str,
    *,
    reads: Reads | None = None,
    storage: StorageSpec | None = None,
) -> SetCard:
    """Write another library's transcoder set to `out` as one of Winnow's, layer by layer.

    Args:
        source: The folder that the library wrote.
        format_name: One of `SET_READERS`.
        out: Folder or URI; must not hold a set or an SAE yet.
        reads: What its latents read; overrides the files, which do not always say.
        storage: Credentials and endpoint of `out`.

    Raises:
        ConfigError: Unknown format, a part that Winnow does not have, files that do not say what is read, or
            an existing set in `out`.
        IntegrityError: Files that are damaged or whose shapes do not fit.
    """
    raw = choose(SET_READERS, "--from", format_name)(source, reads)
    store = open_store(out, storage)
    if store.size(SET_KEY) is not None or store.size(CARD_KEY) is not None:
        raise ConfigError(f"{out} is in use", expected="no set and no SAE", fix="Import into another folder")
    for note in raw.notes:
        log.warning("%s", note)
    cards: dict[int, SaeCard] = {}
    negative = False
    for layer in raw.of.range:
        found = raw.read(layer)
        negative |= found.threshold is not None and bool((found.threshold < 0).any())
        sae = unfold(found, raw.activation, raw.k)
        cards[layer] = sae.save(store.child(layer_folder(layer)), **hooks_of_layer(raw.of, layer))
    notes = raw.notes
    if negative:
        notes += ("some thresholds are below 0: codes there may be negative, and here they are at least 0",)
        log.warning("%s", notes[-1])
    # Last: the set exists once its card does.
    return put_set_card(store, raw.of, cards, notes=notes)


def export_set(
    uri: str,
    format_name: str,
    out: Path,
    *,
    model: str | None = None,
    dataset: str | None = None,
    storage: StorageSpec | None = None,
) -> Exported:
    """Write one of Winnow's transcoder sets to the folder `out` in another library's format.

    Args:
        uri: The set.
        format_name: One of `SET_WRITERS`.
        out: Folder; must be empty or absent.
        model: The subject's name as that library knows it; None takes the set's.
        dataset: Folder or URI of a dataset with all of its hooks: TopK is replaced by thresholds that are set
            on its rows, and what they cost is measured on the held-out ones.
        storage: Credentials and endpoint of the set and the dataset.

    Raises:
        ConfigError: Unknown format, a set that it cannot hold (the message says why), or a folder in use.
    """
    write = choose(SET_WRITERS, "--to", format_name)
    check = choose(_CHECKS, "--to", format_name)
    require_free(out)
    store = open_store(uri, storage)
    if store.size(SET_KEY) is None and store.size(CARD_KEY) is not None:
        raise ConfigError(
            f"{uri} is an SAE",
            expected=f"a transcoder set for --to {format_name}",
            fix="Export the whole set",
        )
    set_ = TranscoderSet.load(uri, storage=storage)
    activation, cost = set_[set_.layers.start].parts.activation, {}
    if dataset is not None and activation != "topk":
        raise ConfigError("--dataset", expected="a set with topk, which has no thresholds", got=activation)
    # Before the rows are read.
    check(set_.of, "batchtopk" if dataset is not None else activation)
    if dataset is not None:
        set_, cost = with_thresholds(set_, dataset, storage)
    identity = set_.card.identity if set_.card else None
    # Only now: a set that was refused leaves no empty folder.
    out.mkdir(parents=True, exist_ok=True)
    write(set_, out, model or (identity.subject_model if identity else None))
    return Exported(tuple(sorted(out.iterdir())), cost)
