"""`winnow harvest CONFIG --repair`: recomputes what only corpus and subject determine.

Tokens come from the corpus and must be the planned ones byte for byte. Rows come from the subject, in
this process: a repair has one writer. `winnow.store.check.repair` does the rest.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from winnow.common.reporter import say
from winnow.harvester.plan.planner import read_corpus
from winnow.harvester.run.single import local_worker
from winnow.schemas.base import sha256_hex
from winnow.schemas.config import Config
from winnow.schemas.errors import IntegrityError, MissingObject
from winnow.schemas.harvest import Attempt, HarvestPlan
from winnow.store.check.repair import RepairReport, repair
from winnow.store.format.labels import label_keys
from winnow.store.format.layout import tokens_key
from winnow.store.format.shards import Stored, encode_chunk
from winnow.store.format.zarr_metadata import LABEL_DIGESTS_KEY, TOKEN_DIGESTS_KEY
from winnow.store.objects import ObjectStore
from winnow.store.read.labels import load_label_digests, read_labels
from winnow.store.read.reader import load_token_digests, read_tokens


def mend(config: Config, store: ObjectStore, plan: HarvestPlan) -> RepairReport:
    """Repair a dataset; units without a receipt are left to the harvest that follows.

    Args:
        config: The harvest's own.
        store: The dataset's root. Nothing else may write to it meanwhile.
        plan: The plan found there.

    Raises:
        IntegrityError: The corpus gives other tokens, or the subject other rows, than were stored.
        StoreError: Storage fails, or something else writes.
    """
    # Tokens first: rows are recomputed from them.
    tokens = _mend_tokens(config, store, plan)
    worker = local_worker(config, store, plan)

    def remake(unit: int) -> tuple[Mapping[str, Stored], Attempt]:
        say(f"repair: recomputing unit {unit}")
        rows, attempt, _ = worker.make(unit)
        return rows, attempt

    report = repair(store, remake)
    report.restored[:0] = tokens
    return report


def _mend_tokens(config: Config, store: ObjectStore, plan: HarvestPlan) -> list[str]:
    """Recompute missing and damaged chunks of tokens and labels from the corpus.

    Returns:
        The keys that were written.
    """
    # Reading the corpus again may take hours: only if something is wrong.
    if _planned_chunks_are_sound(store, plan):
        return []
    say("repair: reading the corpus again for its tokens")
    folder = config.harvest.temp_dir or tempfile.gettempdir()
    done: list[str] = []
    with read_corpus(config, folder, plan) as run:
        run.read()
        digests = run.digests()
        made = {TOKEN_DIGESTS_KEY: digests.tokens}
        if plan.labels is not None and digests.labels is not None:
            made[LABEL_DIGESTS_KEY] = digests.labels
            _refuse_other("labels", digests.labels, plan.labels.sha256)
        # Before anything is overwritten: another corpus or tokenizer must not replace good chunks by others.
        _refuse_other("tokens", digests.tokens, plan.tokens_sha256)
        for key, values in made.items():
            done += _put_back(store, key, values)
        for unit, planned in enumerate(run.units()):
            done += _put_back(store, tokens_key(unit), planned.tokens)
            for name, key in label_keys(plan, unit).items():
                done += _put_back(store, key, planned.labels[name])
    return done


def _planned_chunks_are_sound(store: ObjectStore, plan: HarvestPlan) -> bool:
    try:
        digests = load_token_digests(store, plan)
        labels = load_label_digests(store, plan) if plan.labels is not None else None
        for unit in range(plan.units):
            read_tokens(store, plan, unit, digests)
            if labels is not None:
                read_labels(store, plan, unit, digests=labels)
    except (IntegrityError, MissingObject):
        return False
    return True


def _refuse_other(what: str, digests: NDArray[np.uint8], planned: str) -> None:
    found = sha256_hex(digests.tobytes())
    if found != planned:
        raise IntegrityError(
            f"the corpus gives other {what} than were planned",
            expected=f"sha256 {planned}",
            got=found,
            fix="Repair with the corpus and the tokenizer of the plan",
        )


def _put_back(store: ObjectStore, key: str, values: NDArray[Any]) -> list[str]:
    """Store a chunk if other bytes are there, or none; the key, if it was written."""
    # Taken before the look, so that the replacement is refused if somebody writes in between.
    version, body = store.version(key), encode_chunk(values)
    try:
        if store.get(key, limit=len(body) + 1) == body:
            return []
    except (IntegrityError, MissingObject):
        pass
    store.replace(key, body, version)
    return [key]
