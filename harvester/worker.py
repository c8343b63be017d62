"""One harvest worker: runs the truncated subject over a unit's windows and commits the unit.

Letters: W windows in a unit, T context length, R rows in a unit, D d_model.

The LM and the commit overlap: while one thread encodes and uploads a unit, another already runs
the LM on the next. The LM itself belongs to one thread at a time.
"""

from __future__ import annotations

import datetime
import hashlib
import threading
import time
import uuid
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from harvester.ledger import UnitFacts
from harvester.subject import Subject
from harvester.waiting import StorageWait
from schemas.config import StorageSpec
from schemas.errors import ConfigError, NonFiniteError
from schemas.harvest import Attempt, HarvestPlan
from schemas.subject import SubjectSpec
from store.layout import STORED_DTYPES, row_permutation
from store.objects import open_store
from store.reader import read_tokens
from store.writer import commit_unit

_TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class UnitWorker:
    """Makes units of one dataset; the body of the Ray actor, usable without Ray.

    Args:
        plan_json: The stored plan.
        root: The dataset's URI; opened here, so that no client and no credential is ever pickled.
        storage: How storage is reached.
        subject: The subject model.
        threads: CPU threads for the LM.
        batch_windows: Windows in one forward pass.
    """

    def __init__(
        self,
        plan_json: bytes,
        root: str,
        storage: StorageSpec,
        subject: SubjectSpec,
        threads: int,
        batch_windows: int,
    ) -> None:
        self._plan = HarvestPlan.from_json(plan_json, origin="plan.json")
        self._store = open_store(root, storage)
        self._spec, self._threads, self._batch = subject, threads, batch_windows
        self._lm = threading.Lock()
        self._windows_done = 0
        self._wait = StorageWait()

    @cached_property
    def _subject(self) -> Subject:
        """The truncated LM; loaded by the first caller, who holds the lock."""
        torch.set_num_threads(self._threads)
        subject = Subject.load(self._spec, until=self._plan.spec.hooks)
        found, planned = subject.identity.weights_sha256, self._plan.subject.weights_sha256
        if found != planned:
            raise ConfigError("subject weights on this worker", expected=planned, got=found)
        return subject

    def ready(self) -> str:
        """Load the subject, so that its errors come before any unit is handed out; gives its device."""
        with self._lm:
            return str(self._subject.device)

    def windows_done(self) -> int:
        """Windows run through the LM so far."""
        return self._windows_done

    def run(self, unit: int) -> UnitFacts:
        """Make and commit one unit.

        Returns:
            What it took, once its receipt is in the store.

        Raises:
            NonFiniteError: NaN or infinity in an activation, with unit, hook and window.
            IntegrityError, StoreError: From the store.
        """
        rows, attempt, tokens_sha256 = self.make(unit)
        with self._wait.commit():
            receipt = commit_unit(
                self._store, self._plan, unit, rows, tokens_sha256=tokens_sha256, attempt=attempt
            )
        return UnitFacts(unit, sum(shard.bytes for shard in receipt.shards.values()), *self._wait.take())

    def make(self, unit: int) -> tuple[dict[str, NDArray[np.generic]], Attempt, str]:
        """Compute one unit and store nothing: hook -> rows [R, D], by whom, and its tokens' digest."""
        with self._lm:
            start = time.monotonic()
            with self._wait.tokens():
                tokens = read_tokens(self._store, self._plan, unit)
            with self._wait.lm():
                rows = self._rows(unit, tokens)
        attempt = Attempt(
            id=uuid.uuid4().hex,
            seconds=time.monotonic() - start,
            batch_windows=self._batch,
            threads=self._threads,
            device=str(self._subject.device),
            finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        return rows, attempt, hashlib.sha256(tokens.astype("<u4").tobytes()).hexdigest()

    def _rows(self, unit: int, tokens: NDArray[np.uint32]) -> dict[str, NDArray[np.generic]]:
        """Every hook's rows [R, D] of a unit, in stored order and stored dtype."""
        plan, spec = self._plan, self._plan.spec
        place = np.empty(plan.rows_per_unit, dtype=np.int64)  # planned row -> stored row
        place[row_permutation(plan, unit)] = np.arange(plan.rows_per_unit)
        rows = {
            site.name: np.empty((plan.rows_per_unit, site.d_model), STORED_DTYPES[spec.dtype])
            for site in plan.sites
        }
        for first in range(0, spec.windows_per_unit, self._batch):
            batch = tokens[first : first + self._batch]
            for hook, values in self._subject.activations(batch, spec.hooks).items():
                kept = values[:, spec.drop_leading :].reshape(-1, values.shape[-1])
                start = first * plan.rows_per_window
                rows[hook][place[start : start + len(kept)]] = self._stored(kept, unit, hook, first)
            self._windows_done += len(batch)
        return rows

    def _stored(self, values: torch.Tensor, unit: int, hook: str, first: int) -> NDArray[np.generic]:
        """[rows, D] values as the plan stores them, refused unless every one is finite."""
        dtype = self._plan.spec.dtype
        stored = values.to(_TORCH_DTYPES[dtype]).cpu()
        if not torch.isfinite(stored).all():
            row = int((~torch.isfinite(stored)).any(dim=1).nonzero()[0])
            window, position = divmod(row, self._plan.rows_per_window)
            overflow = bool(torch.isfinite(values[row]).all())
            raise NonFiniteError(
                f"unit {unit}, hook {hook}, window {first + window} of the unit, "
                f"position {position + self._plan.spec.drop_leading}",
                expected=f"finite {dtype} values",
                got=f"overflow of {dtype}" if overflow else "NaN or infinity from the subject",
                fix="Store bfloat16 or float32" if overflow else "Run the subject in float32",
            )
        view = stored.view(torch.uint16) if dtype == "bfloat16" else stored
        return view.numpy()
