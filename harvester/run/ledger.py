"""The ledger beside the manifest: what each run of a harvest did, and where every token went."""

from __future__ import annotations

import datetime
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass

from winnow.common.reporter import say
from winnow.harvester.run.failures import Failures
from winnow.schemas.errors import MissingObject, WinnowError
from winnow.schemas.harvest import HarvestLedger, HarvestManifest, HarvestPlan, LedgerRun, TokenAccount
from winnow.store.objects import ObjectStore

LEDGER_KEY = "ledger.json"
WRITE_SECONDS = 30.0
"""Between entries while a run goes on, so that a killed one leaves its record."""


@dataclass(frozen=True)
class UnitFacts:
    """What a worker reports of one committed unit."""

    unit: int
    bytes: int
    """Of its shards."""
    lm_seconds: float
    storage_wait_seconds: float
    """Both since the worker's last report."""
    batch_windows: int | None = None
    """Windows in each pass of the LM."""


def read_ledger(store: ObjectStore) -> HarvestLedger:
    """The ledger beside the manifest; empty where no run has written one."""
    try:
        return HarvestLedger.from_json(store.get(LEDGER_KEY), origin=LEDGER_KEY)
    except MissingObject:
        return HarvestLedger()


def account(plan: HarvestPlan, manifest: HarvestManifest | None = None) -> TokenAccount:
    """Where the corpus's tokens went; sinks and void rows where the dataset is sealed."""
    bos = plan.spec.bos == "window"
    payload = plan.spec.context_length - bos
    facts = plan.corpus_facts
    return TokenAccount(
        corpus=facts.tokens,
        bos_added=plan.windows * bos,
        beyond_plan=facts.windows_unused * payload,
        tails=facts.tokens_unused,
        leading=plan.windows * plan.spec.drop_leading,
        stored=plan.rows,
        sinks=manifest.sinks if manifest else {},
        void=len(manifest.void_units) * plan.rows_per_unit if manifest else None,
    )


class RunLedger:
    """One run's entry, written as it goes. Of two harvests on one root each keeps its own.

    Args:
        store: The dataset's root.
        plan: Its plan.
        failures: Counts the attempts that failed.
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
        elif self.units:
            with suppress(WinnowError):  # what ended the run is the message
                self._write(ended=False)

    def start(self) -> None:
        """The first unit is handed out now."""
        self._start = self._last = self._written = time.monotonic()

    def add(self, facts: UnitFacts) -> None:
        """Count a committed unit; now and then the entry is written."""
        if facts.batch_windows != self.batch_windows:
            self.batch_windows = facts.batch_windows
            say(f"harvest: {facts.batch_windows} windows in a pass of the LM")
        self._last = time.monotonic()
        self.units += 1
        self.bytes += facts.bytes
        self.lm_seconds += facts.lm_seconds
        self.storage_wait_seconds += facts.storage_wait_seconds
        if self._last - self._written >= WRITE_SECONDS:
            self._write(ended=False)

    def entry(self, *, ended: bool) -> LedgerRun:
        """The run as it stands."""
        spec = self._plan.spec
        return LedgerRun(
            id=self._id,
            finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            ended=ended,
            units=self.units,
            tokens=self.units * spec.windows_per_unit * spec.context_length,
            bytes=self.bytes,
            seconds=self._last - self._start,
            lm_seconds=self.lm_seconds,
            storage_wait_seconds=self.storage_wait_seconds,
            failures=self._failures.total if self._failures else 0,
            batch_windows=self.batch_windows,
        )

    def _write(self, *, ended: bool) -> None:
        ledger = read_ledger(self._store)
        others = tuple(run for run in ledger.runs if run.id != self._id)
        ledger = ledger.model_copy(update={"runs": (*others, self.entry(ended=ended))})
        self._store.put(LEDGER_KEY, ledger.to_json())
        self._written = time.monotonic()


def settle_account(store: ObjectStore, plan: HarvestPlan, manifest: HarvestManifest) -> None:
    """Write the account of tokens once the dataset is sealed; nothing where it stands already."""
    ledger, found = read_ledger(store), account(plan, manifest)
    if ledger.account != found:
        store.put(LEDGER_KEY, ledger.model_copy(update={"account": found}).to_json())
