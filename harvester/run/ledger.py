"""The ledger beside the manifest: what each run of a harvest did, and an account of every token."""

from __future__ import annotations

import datetime
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass

from winnow.common.figures import count_of
from winnow.common.reporter import say
from winnow.harvester.run.failures import Failures
from winnow.schemas.errors import MissingObject, WinnowError
from winnow.schemas.harvest import HarvestManifest, HarvestPlan
from winnow.schemas.ledger import HarvestLedger, LedgerRun, TokenAccount
from winnow.store.objects import ObjectStore

LEDGER_KEY = "ledger.json"
WRITE_SECONDS = 30.0
"""Seconds between writes while a run lasts, so that a killed one leaves its record."""


@dataclass(frozen=True)
class UnitFacts:
    """A worker's report of one committed unit."""

    unit: int
    bytes: int
    """Of its shards."""
    lm_seconds: float
    storage_wait_seconds: float
    """Both since the worker's last report."""
    batch_windows: int | None = None
    """Windows in each pass of the LM."""
    batch_source: str = ""
    """Where that number comes from, for people."""


def read_ledger(store: ObjectStore) -> HarvestLedger:
    """The ledger beside the manifest; empty if no run has written one."""
    try:
        return _parsed(store.get(LEDGER_KEY))
    except MissingObject:
        return HarvestLedger()


def _parsed(data: bytes | None) -> HarvestLedger:
    return HarvestLedger() if data is None else HarvestLedger.from_json(data, origin=LEDGER_KEY)


def account(plan: HarvestPlan, manifest: HarvestManifest | None = None) -> TokenAccount:
    """The account of the corpus's tokens; with sinks and void rows once the dataset is sealed."""
    facts, length = plan.corpus_facts, plan.spec.context_length
    bos = plan.windows if plan.spec.bos == "window" else 0
    beyond = facts.windows_unused * (length - (bos > 0))
    if plan.labels and plan.labels.own_bos is not None:
        bos -= plan.labels.own_bos
        # The rest: how many of these windows begin with a document's own BOS is not recorded.
        beyond = facts.tokens + bos - facts.tokens_unused - plan.windows * length
    return TokenAccount(
        corpus=facts.tokens,
        bos_added=bos,
        beyond_plan=beyond,
        tails=facts.tokens_unused,
        leading=plan.windows * plan.spec.drop_leading,
        stored=plan.rows,
        sinks=manifest.sinks if manifest else {},
        void=len(manifest.void_units) * plan.rows_per_unit if manifest else None,
    )


class RunLedger:
    """One run's entry, rewritten while the run lasts. Each of two harvests on one root keeps its own.

    Args:
        store: The dataset's root.
        plan: Its plan.
        failures: The run's failures, for the number of failed attempts.
    """

    def __init__(self, store: ObjectStore, plan: HarvestPlan, failures: Failures | None = None) -> None:
        self._store, self._plan, self._failures = store, plan, failures
        self._id = uuid.uuid4().hex
        self.start()
        self.units = self.bytes = 0
        self.batch_windows: int | None = None
        self.lm_seconds = self.storage_wait_seconds = 0.0

    def __enter__(self) -> RunLedger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self._write(ended=True)
        # A run that failed before its first commit has nothing to record.
        elif self.units:
            # The error that ended the run is the message, not that the store is unreachable here as well.
            with suppress(WinnowError):
                self._write(ended=False)

    def start(self) -> None:
        """Start the clock: the first unit is handed out now."""
        self._start = self._last = self._written = time.monotonic()

    def add(self, facts: UnitFacts) -> None:
        """Count a committed unit, and write the entry if it is due."""
        # Reported when it changes: the shape decides the rows' last bits, and a smaller one means that memory
        # ran out.
        if facts.batch_windows is not None and facts.batch_windows != self.batch_windows:
            self.batch_windows = facts.batch_windows
            say(
                f"harvest: {count_of(facts.batch_windows, 'window')} per pass of the LM, {facts.batch_source}"
            )
        self._last = time.monotonic()
        self.units += 1
        self.bytes += facts.bytes
        self.lm_seconds += facts.lm_seconds
        self.storage_wait_seconds += facts.storage_wait_seconds
        if self._last - self._written >= WRITE_SECONDS:
            self._write(ended=False)

    def entry(self, *, ended: bool) -> LedgerRun:
        """The run so far."""
        spec = self._plan.spec
        return LedgerRun(
            id=self._id,
            finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            ended=ended,
            units=self.units,
            tokens=self.units * spec.windows_per_unit * spec.context_length,
            bytes=self.bytes,
            # To the last commit: what follows, such as the seal, is no part of the rate.
            seconds=self._last - self._start,
            lm_seconds=self.lm_seconds,
            storage_wait_seconds=self.storage_wait_seconds,
            failures=self._failures.total if self._failures else 0,
            batch_windows=self.batch_windows,
        )

    def _write(self, *, ended: bool) -> None:
        own = self.entry(ended=ended)

        def change(data: bytes | None) -> bytes:
            ledger = _parsed(data)
            others = tuple(run for run in ledger.runs if run.id != self._id)
            return ledger.model_copy(update={"runs": (*others, own)}).to_json()

        # Each job of an array writes its entry, the last ones at about the same moment.
        self._store.update(LEDGER_KEY, change)
        self._written = time.monotonic()


def settle_account(store: ObjectStore, plan: HarvestPlan, manifest: HarvestManifest) -> None:
    """Write the account of tokens once the dataset is sealed, unless it is there already."""
    found = account(plan, manifest)

    def change(data: bytes | None) -> bytes:
        ledger = _parsed(data)
        if data is not None and ledger.account == found:
            return data
        return ledger.model_copy(update={"account": found}).to_json()

    store.update(LEDGER_KEY, change)
