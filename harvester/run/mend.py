"""`winnow harvest CONFIG --repair`: recomputes what only corpus and subject determine.

Tokens come from the corpus and must be the planned ones byte for byte. Rows come from the subject, in
this process: a repair has one writer. `winnow.store.check.repair` does the rest.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping

from winnow.common.reporter import say
from winnow.harvester.plan.planner import read_corpus
from winnow.harvester.run.single import local_worker
from winnow.schemas.base import sha256_hex
from winnow.schemas.config import Config
from winnow.schemas.errors import IntegrityError, MissingObject
from winnow.schemas.harvest import Attempt, HarvestPlan
from winnow.store.check.repair import RepairReport, repair
from winnow.store.format.layout import tokens_key
from winnow.store.format.shards import Stored, encode_chunk
from winnow.store.format.zarr_metadata import TOKEN_DIGESTS_KEY
from winnow.store.objects import ObjectStore
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
    """Recompute missing and damaged token chunks from the corpus.

    Returns:
        The keys that were written.
    """
    try:
        digests = load_token_digests(store, plan)
    except (IntegrityError, MissingObject):
        digests = None
    bad: set[int] = set()
    for unit in range(plan.units):
        try:
            if digests is None:
                break
            read_tokens(store, plan, unit, digests)
        except (IntegrityError, MissingObject):
            bad.add(unit)
    # Reading the corpus again may take hours: only if something is wrong.
    if digests is not None and not bad:
        return []
    say(
        "repair: reading the corpus again for " + ("the token digests" if digests is None else "token chunks")
    )
    folder = config.harvest.temp_dir or tempfile.gettempdir()
    done: list[str] = []
    with read_corpus(config, folder, plan) as run:
        run.read()
        made = run.digests()
        # Before anything is overwritten: another corpus or tokenizer must not replace good chunks by others.
        if sha256_hex(made.tobytes()) != plan.tokens_sha256:
            raise IntegrityError(
                "the corpus gives other tokens than were planned",
                expected=f"sha256 {plan.tokens_sha256}",
                got=sha256_hex(made.tobytes()),
                fix="Repair with the corpus and the tokenizer of the plan",
            )
        if digests is None:
            store.replace(TOKEN_DIGESTS_KEY, encode_chunk(made), store.version(TOKEN_DIGESTS_KEY))
            done.append(TOKEN_DIGESTS_KEY)
        for unit, tokens in enumerate(run.units()):
            key = tokens_key(unit)
            # Taken before the look, so that the replacement is refused if somebody writes in between.
            version = store.version(key)
            try:
                read_tokens(store, plan, unit, made)
            except (IntegrityError, MissingObject):
                store.replace(key, encode_chunk(tokens), version)
                done.append(key)
    return done
