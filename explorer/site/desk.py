"""Opens what a server of SAEs shows: their indexes, explanations, the dataset and the subject."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

from winnow.evaluator.report import load_evaluation
from winnow.explorer.index.subjects import LazySubject
from winnow.explorer.index.table import FeatureTable
from winnow.explorer.place import Place, default_index
from winnow.explorer.site.api import Desk
from winnow.explorer.site.exhibit import Exhibit
from winnow.explorer.site.explained import from_evaluation
from winnow.explorer.site.lane import Lane
from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import ConfigError, StoreError
from winnow.schemas.fit import check_one_subject, mismatch
from winnow.schemas.window import WindowRule
from winnow.store import ActivationStore
from winnow.store.objects import open_store

log = logging.getLogger("winnow.explorer")


def open_desk(saes: list[str], index: list[str] | None, place: Place, seats: int) -> Desk:
    """What a server of these SAEs shows.

    Raises:
        ConfigError: An SAE is not indexed.
        SaeMismatch: They belong to different subjects.
    """
    where = [*(index or []), *(default_index(sae) for sae in saes[len(index or []) :])]
    exhibits: list[Exhibit] = []
    for sae, folder in zip(saes, where, strict=True):
        table = FeatureTable.open(folder, place.storage)
        add_explanations(table, sae, place.storage)
        exhibits.append(Exhibit(sae.rstrip("/").rsplit("/", 1)[-1] or sae, sae, table, place.storage))
    check_one_subject(
        [exhibit.uri for exhibit in exhibits], [exhibit.table.meta.subject for exhibit in exhibits]
    )
    meta = exhibits[0].table.meta
    root = place.root or meta.root

    @cache
    def dataset() -> ActivationStore:
        found = ActivationStore.open(root, place.storage)
        if found.plan.fingerprint != meta.plan_fingerprint:
            raise mismatch(
                "plan",
                f"the dataset at {root}",
                expected=meta.plan_fingerprint,
                of="the index",
                got=found.plan.fingerprint,
                fix="Give the dataset that was indexed as --root",
            )
        return found

    at_hand = dataset
    try:
        dataset()
    except (StoreError, ConfigError) as error:
        log.warning("explorer: the dataset cannot be opened, so ablations take pasted text only (%s)", error)
        at_hand = None
    for exhibit in exhibits:
        exhibit.window = _window_rule(exhibit, at_hand)
    return Desk(exhibits, LazySubject(place.subject, meta.subject), Lane(seats), at_hand)


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
