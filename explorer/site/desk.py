"""What a server of SAEs shows: their indexes, explanations, the dataset and the subject."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from winnow.evaluator.report import load_evaluation
from winnow.explorer.index.subjects import LazySubject, joined_subjects
from winnow.explorer.index.table import FeatureTable
from winnow.explorer.place import Place, default_index
from winnow.explorer.site.circuit import Circuits
from winnow.explorer.site.context import Contexts
from winnow.explorer.site.edits import make_runner
from winnow.explorer.site.exhibit import Exhibit
from winnow.explorer.site.explained import from_evaluation
from winnow.explorer.site.graphs import GRAPHS, Shelf
from winnow.explorer.site.kinds import Kinds
from winnow.explorer.site.lane import Lane
from winnow.explorer.site.layers import indexed_layers, open_set
from winnow.explorer.site.relations import Relations
from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import ConfigError, StoreError
from winnow.schemas.fit import check_one_subject, mismatch
from winnow.schemas.joined import hooks_by_root
from winnow.schemas.window import WindowRule
from winnow.store import ActivationStore
from winnow.store.objects import open_store
from winnow.store.read.joined import open_roots
from winnow.subject.load import Subject

log = logging.getLogger("winnow.explorer")

# A feature page offers 36 examples, each of which can be ablated: a few latents' worth.
_CACHED_EFFECTS = 256
"""Replies about ablations, promotions and relations that are kept."""


@dataclass
class Desk:
    """What all requests share.

    Attributes:
        exhibits: The SAEs that the site shows.
        subjects: Name of the dataset -> the subject they belong to; the name is empty if there is one.
            Without entries if nothing says which one, as for a graph's file alone.
        lane: The queue in front of the subject.
        dataset: Opens the dataset; None if it is not available.
        circuits: The graphs, and what their page needs.
        effects: Newest replies about ablations, promotions and relations by request, for repeated ones.
    """

    exhibits: list[Exhibit]
    subjects: Mapping[str, LazySubject]
    lane: Lane
    dataset: Callable[[], ActivationStore] | None = None
    circuits: Circuits = field(default_factory=Circuits)
    effects: OrderedDict[Any, Any] = field(default_factory=OrderedDict)

    @cached_property
    def kinds(self) -> Kinds | None:
        """What the dataset's tokens are; None if it is not available."""
        return Kinds(self.dataset) if self.dataset is not None else None

    @cached_property
    def contexts(self) -> Contexts | None:
        """The texts around the dataset's tokens; None if it is not available."""
        return Contexts(self.dataset) if self.dataset is not None else None

    @cached_property
    def relations(self) -> Relations | None:
        """What latents of a set's layers have to do with each other; None without a set."""
        if self.circuits.set_sha256 is None:
            return None
        layers = {layer: self.exhibits[number] for layer, number in self.circuits.layers.items()}
        return Relations(layers, self.circuits.layers, self.dataset, self.model if self.subjects else None)

    def once(self, key: Any, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The reply to a request: the one given before, or what `compute` returns."""
        # Looked up before a seat is taken: a repeated request never meets a busy model.
        if key in self.effects:
            self.effects.move_to_end(key)
            return self.effects[key]
        reply = self.effects[key] = compute()
        while len(self.effects) > _CACHED_EFFECTS:
            self.effects.popitem(last=False)
        return reply

    def model(self, name: str = "") -> Subject:
        """A subject with all its layers, loaded when it is first needed.

        Args:
            name: Of several subjects, the name of the dataset.

        Raises:
            ConfigError: The server has none, or no such one.
            SaeMismatch: Other weights than the dataset was harvested from.
        """
        if name not in self.subjects:
            got = ", ".join(self.subjects) or "none"
            expected = f"the subject {name}" if name else "a subject"
            raise ConfigError("subject", expected=expected, got=got, fix="Name it in --config FILE")
        return self.subjects[name].whole()

    def readers(self, exhibit: Exhibit) -> dict[str, Subject]:
        """The subjects whose rows an SAE reads, by the name of the dataset, which is empty if there is one.

        Raises:
            ConfigError: The server has none.
            SaeMismatch: Other weights than the dataset was harvested from.
        """
        hooks = tuple(part.hook for part in exhibit.table.meta.parts) or (exhibit.table.meta.hook,)
        names = hooks_by_root(hooks)
        return {name: self.model(name) for name in names}

    def exhibit(self, number: int) -> Exhibit:
        """The SAE of a number.

        Raises:
            ConfigError: No such SAE.
        """
        if not self.exhibits:
            raise ConfigError("sae", expected="an index", got="none", fix="Run `winnow index SET` first")
        if not 0 <= number < len(self.exhibits):
            raise ConfigError("sae", expected=f"0 to {len(self.exhibits) - 1}", got=number)
        return self.exhibits[number]

    def latent(self, exhibit: Exhibit, number: int) -> int:
        """Return `number` if the SAE has such a latent.

        Raises:
            ConfigError: It has not.
        """
        if not 0 <= number < exhibit.table.meta.latents:
            raise ConfigError("latent", expected=f"0 to {exhibit.table.meta.latents - 1}", got=number)
        return number


def open_desk(
    saes: list[str], index: list[str] | None, place: Place, seats: int, graphs: Sequence[Path] = ()
) -> Desk:
    """What a server of these SAEs, or of the layers of a set, shows.

    Args:
        saes: SAEs, or one transcoder set, whose layers are shown as far as they are indexed.
        index: Folders of the SAEs' indexes, in their order; the default is `default_index`.
        place: The dataset and the subject.
        seats: Requests to the subject at a time.
        graphs: Files of attribution graphs, beside those in the set's folder.

    Raises:
        ConfigError: An SAE is not indexed, or a set is shown beside something else.
        SaeMismatch: They belong to different subjects.
    """
    of = open_set(saes, index, place.storage)
    where = [*(index or []), *(default_index(sae) for sae in saes[len(index or []) :])] if of is None else []
    layers = indexed_layers(of, place.storage) if of else {}
    shown = [(sae, folder, _last(sae)) for sae, folder in zip(saes, where, strict=of is None)]
    if of is not None:
        shown = [(sae, default_index(sae), f"{_last(of.uri)}, layer {at}") for at, sae in layers.items()]
    exhibits: list[Exhibit] = []
    for sae, folder, name in shown:
        table = FeatureTable.open(folder, place.storage)
        add_explanations(table, sae, place.storage)
        exhibits.append(Exhibit(name, sae, table, place.storage))
    check_one_subject(
        [exhibit.uri for exhibit in exhibits], [exhibit.table.meta.subject for exhibit in exhibits]
    )
    at_hand = _dataset(exhibits, place)
    for exhibit in exhibits:
        exhibit.window = _window_rule(exhibit, at_hand)
    subjects = _subjects(exhibits, place, at_hand)
    circuits = Circuits(Shelf(of.store.child(GRAPHS) if of else None, list(graphs)))
    if of is not None:
        circuits.layers = {layer: number for number, layer in enumerate(layers)}
        circuits.unindexed = tuple(entry.layer for entry in of.card.layers if entry.layer not in layers)
        circuits.set_sha256 = of.card.layers_sha256
        circuits.runner = make_runner(of, place.subject, place.storage)
    return Desk(exhibits, subjects, Lane(seats), at_hand, circuits)


def _last(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1] or uri


def _dataset(exhibits: list[Exhibit], place: Place) -> Callable[[], ActivationStore] | None:
    """Opens the dataset that was indexed; None, and a warning, if it is not available."""
    meta = exhibits[0].table.meta if exhibits else None
    root = place.root or (meta.root if meta else None)
    roots = (place.roots or meta.roots) if meta and meta.roots else None
    if root is None:
        return None

    @cache
    def dataset() -> ActivationStore:
        found = open_roots(root, roots, place.storage)
        if meta is not None and found.plan.fingerprint != meta.plan_fingerprint:
            raise mismatch(
                "plan",
                f"the dataset at {root}",
                expected=meta.plan_fingerprint,
                of="the index",
                got=found.plan.fingerprint,
                fix="Give the dataset that was indexed as --root",
            )
        return found

    try:
        dataset()
    except (StoreError, ConfigError) as error:
        log.warning("explorer: the dataset cannot be opened, so ablations take pasted text only (%s)", error)
        return None
    return dataset


def _subjects(
    exhibits: list[Exhibit], place: Place, dataset: Callable[[], ActivationStore] | None
) -> Mapping[str, LazySubject]:
    """The subjects that the indexes name, else the dataset's; none if neither is there."""
    if exhibits:
        planned = exhibits[0].table.meta.subjects
        several = joined_subjects(planned, place.subject, place.subjects)
        return several or {"": LazySubject(place.subject, exhibits[0].table.meta.subject)}
    return {"": LazySubject(place.subject, dataset().plan.subject)} if dataset else {}


def _window_rule(exhibit: Exhibit, dataset: Callable[[], ActivationStore] | None) -> WindowRule:
    """How an SAE's windows begin: as its index says, else (an index of before) as its dataset's plan does.

    Where neither is there, texts are read without BOS, and that is said.
    """
    meta = exhibit.table.meta
    if meta.window is not None:
        return meta.window
    if dataset is not None and dataset().plan.fingerprint == meta.plan_fingerprint:
        return WindowRule.of(dataset().plan)
    if meta.subject.bos_token_id is not None:
        log.warning(
            "explorer: the index of %s does not say whether windows begin with BOS: texts are read without "
            "it; `--root` with its dataset, or indexing anew, tells",
            exhibit.name,
        )
    return WindowRule()


def add_explanations(table: FeatureTable, sae: str, storage: StorageSpec) -> None:
    """Add those of this SAE's evaluations that lie beside it, first that of the index's dataset."""
    stored = load_evaluation(open_store(sae, storage))
    evaluations = [one for one in stored.each if one.sae_sha256 == table.meta.sae_sha256] if stored else []
    evaluations.sort(key=lambda one: one.plan_fingerprint != table.meta.plan_fingerprint)
    for evaluation in evaluations:
        for each in from_evaluation(evaluation):
            known = table.explanations.setdefault(each.latent, [])
            if each not in known:
                known.append(each)
