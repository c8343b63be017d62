"""The harvest's ledger: where every token went, and who harvested what."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from winnow.schemas.base import Artefact, Contract, HookName


class TokenAccount(Contract):
    """Where every token of the corpus went: `corpus + bos_added` is the sum of the four fields after them."""

    corpus: int = Field(ge=0)
    """Tokens of all documents, including those that join them."""
    bos_added: int = Field(ge=0)
    """BOS tokens that planned windows begin with; the corpus does not contain them."""
    beyond_plan: int = Field(ge=0)
    """Tokens in whole windows that were left over after the planned units."""
    tails: int = Field(ge=0)
    """Tokens in no window: the end of each split."""
    leading: int = Field(ge=0)
    """Tokens at the leading positions of planned windows, which are not stored."""
    stored: int = Field(ge=0)
    """Tokens that become rows: rows of each hook once every unit is committed."""
    sinks: dict[HookName, int] = {}
    """Rows among `stored` that are marked as sinks (weight 0), by hook; known once the dataset is sealed."""
    void: int | None = None
    """Rows among `stored` that belong to void units (weight 0); null until the dataset is sealed."""


class LedgerRun(Contract):
    """What one run of `winnow harvest` did."""

    id: str = ""
    """Random id, new for every run."""
    finished: str
    """When this entry was last written: UTC, ISO 8601."""
    ended: bool = True
    """False while the run continues, and for ever if it was killed."""
    units: int = Field(ge=0)
    """Units that this run committed."""
    tokens: int = Field(ge=0)
    """Tokens of those units' windows, W x T per unit."""
    bytes: int = Field(default=0, ge=0)
    """Bytes of those units' shards."""
    seconds: float = Field(ge=0)
    """Wall-clock seconds from the first unit handed out to the last receipt; loading the model is
    excluded."""
    lm_seconds: float = Field(default=0.0, ge=0)
    """Seconds that the model computed, summed over actors."""
    storage_wait_seconds: float = Field(default=0.0, ge=0)
    """Seconds that the model waited for storage, for tokens to arrive or units to be committed, summed over
    actors."""
    failures: int = Field(default=0, ge=0)
    """Attempts at a unit that failed and were repeated."""
    batch_windows: int | None = None
    """Windows per forward pass of the unit that was committed last."""


class HarvestLedger(Artefact):
    """`ledger.json`: the history of the harvest, run by run. Rewritten; no part of the dataset's identity."""

    kind: Literal["winnow.ledger"] = "winnow.ledger"
    runs: tuple[LedgerRun, ...] = ()
    """The runs, oldest first."""
    account: TokenAccount | None = None
    """Where the corpus's tokens went."""

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second over all runs; None before the first unit."""
        seconds = sum(run.seconds for run in self.runs)
        tokens = sum(run.tokens for run in self.runs)
        return tokens / seconds if seconds and tokens else None

    @property
    def bytes_per_second(self) -> float | None:
        """Bytes of shards per second over all runs that counted them; None before the first unit."""
        # Ledgers of older versions have runs without bytes; their seconds must not count either.
        counted = [run for run in self.runs if run.bytes]
        seconds = sum(run.seconds for run in counted)
        return sum(run.bytes for run in counted) / seconds if seconds else None

    @property
    def storage_wait_seconds(self) -> float:
        """Seconds that the model waited for storage, summed over all runs and actors."""
        return sum(run.storage_wait_seconds for run in self.runs)
