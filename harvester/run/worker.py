"""One harvest worker: runs the truncated subject over a unit's windows and commits the unit.

Letters: W windows per unit, T context length, R rows per unit, D d_model.

The LM and the commit overlap: while one thread encodes and uploads a unit, another already runs
the LM on the next. The LM itself belongs to one thread at a time.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import threading
import time
import uuid
from collections.abc import Callable
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from winnow.common.memory import out_of_memory
from winnow.harvester.run.batching import choose_batch, free_memory, record_smaller_batch
from winnow.harvester.run.copyout import CopyOut
from winnow.harvester.run.engine_check import EngineCheck
from winnow.harvester.run.ledger import UnitFacts
from winnow.harvester.run.waiting import StorageWait
from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import ConfigError, NonFiniteError, WorkerError
from winnow.schemas.harvest import SCALE_BYTES, Attempt, HarvestPlan
from winnow.schemas.subject import SubjectSpec
from winnow.store.format.layout import STORED_DTYPES, row_permutation
from winnow.store.objects import open_store
from winnow.store.read.labels import read_positions
from winnow.store.read.reader import read_tokens
from winnow.store.write.writer import commit_unit
from winnow.subject.divided import DividedSubject, refuse_documents
from winnow.subject.engine import EngineReader, reader_of
from winnow.subject.load import Subject

log = logging.getLogger("winnow.harvester")

_TORCH_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": torch.float32,  # before it is scaled
}
_INT8_VALUES = 1 << 17
"""Values scaled at a time on a CPU: 512 KiB."""
# A float is NaN or infinite exactly if all bits of its exponent are set.
_EXPONENTS = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
}


def all_finite(values: torch.Tensor) -> torch.Tensor:
    """Whether no value is NaN or infinity, as a bool [] on their device."""
    # Not `values.isfinite().all()`: for bfloat16 on a CPU it takes 36 times as long as the exponents' bits.
    # A sum needs no memory and is finite only if all values are; it may overflow, so only its yes counts.
    if values.device.type == "cpu" and bool((total := values.sum()).isfinite()):
        return total.isfinite()
    integer, exponent = _EXPONENTS[values.dtype]
    return values.view(integer).bitwise_and(exponent).amax() < exponent


def to_int8(rows: torch.Tensor) -> torch.Tensor:
    """float32 [W, P, D] -> int8 [W * P, D + 4] on their device; they need not be contiguous.

    Bit for bit as `store.format.shards.to_stored`.
    """
    W, P, D = rows.shape
    stored = torch.empty(W, P, D + SCALE_BYTES, dtype=torch.int8, device=rows.device)
    # On a CPU a block at a time, which stays in the cache: 0.6 of the time of whole tensors. With many hooks
    # this is the largest cost beside the LM.
    windows, step = (1, max(1, _INT8_VALUES // D)) if rows.device.type == "cpu" else (W, P)
    for block, to in zip(rows.split(windows), stored.split(windows), strict=True):
        for part, into in zip(block.split(step, 1), to.split(step, 1), strict=True):
            values = part.abs()
            # Clamped, so that a row of zeros is not divided by zero. The scale travels in the row's last four
            # bytes, so that a slice contains everything its rows need.
            scale = (values.amax(dim=2, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
            into[..., :D] = torch.div(part, scale, out=values).round_()
            into[..., D:] = scale.view(torch.int8)
    return stored.view(W * P, D + SCALE_BYTES)


def _as_items(rows: NDArray[np.generic]) -> NDArray[np.void]:
    """[R, D] contiguous -> [R], each row one item: NumPy puts those in their places faster.

    Between items of different sizes NumPy truncates and pads without an error: check the widths before.
    """
    return rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1])))[:, 0]


def _telling(stored: torch.Tensor) -> torch.Tensor:
    """The values that are finite exactly if the stored rows are: the scales [R, 1] of int8, else the rows."""
    if stored.dtype != torch.int8:
        return stored
    return stored[:, -SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float32)


class UnitWorker:
    """Makes units of one dataset; the body of the Ray actor, usable without Ray.

    Args:
        plan_json: The stored plan.
        root: The dataset's URI; opened here, so that no client and no credential is ever pickled.
        storage: How storage is accessed.
        subject: The subject model.
        threads: CPU threads for the LM.
        batch_windows: Windows in one forward pass; `auto`: see `winnow.harvester.run.batching`.
        gpus: GPUs of this worker. If less than one, it stays within that share of the card's memory.
    """

    def __init__(
        self,
        plan_json: bytes,
        root: str,
        storage: StorageSpec,
        subject: SubjectSpec,
        threads: int,
        batch_windows: int | Literal["auto"],
        gpus: float = 0.0,
    ) -> None:
        self._plan = HarvestPlan.from_json(plan_json, origin="plan.json")
        self._store = open_store(root, storage)
        self._spec, self._threads, self._gpus = subject, threads, gpus
        self._auto = batch_windows == "auto"
        self._batch = 0 if batch_windows == "auto" else batch_windows  # 0: not chosen yet
        self._batch_source = "as harvest.batch_windows says"
        # A subject may not be used by several threads at once, and two units are in this worker.
        self._lm = threading.Lock()
        self._windows_done = 0
        # Arrays of committed units, written over by later ones: fresh pages of a whole unit cost time.
        self._spare: list[dict[str, NDArray[np.generic]]] = []
        self._wait = StorageWait()

    @cached_property
    def _subject(self) -> Subject:
        """The truncated LM; loaded by the first caller, who holds the lock."""
        torch.set_num_threads(self._threads)
        spec, hooks = self._as_planned, self._plan.spec.hooks
        subject = Subject.load(spec, until=hooks) if self._divided is None else self._divided.subject
        # Ray reserves a share of a GPU only in its books; nothing else keeps actors on one card apart.
        if subject.device.type == "cuda" and 0 < self._gpus < 1:
            torch.cuda.set_per_process_memory_fraction(self._gpus, subject.device)
        # A hub branch, or a folder of the same name, may hold other weights on another node.
        found, planned = subject.identity.weights_sha256, self._plan.subject.weights_sha256
        if found != planned:
            raise ConfigError("subject weights on this worker", expected=planned, got=found)
        for site in subject.sites(self._plan.spec.hooks):
            self._check_width(site.name, site.d_model)
        # Here too: this node may have another device or another transformers than the planner.
        if self._plan.spec.attend == "document":
            subject.require_documents_apart(self._plan.spec.context_length)
        return subject

    @property
    def _as_planned(self) -> SubjectSpec:
        # `auto` could choose otherwise on this node, by its device or its transformers, and rows of one
        # dataset would come from two models.
        planned = self._plan.subject
        return self._spec.model_copy(
            update={"dtype": planned.dtype, "attention": planned.attention, "engine": planned.engine}
        )

    @cached_property
    def _divided(self) -> DividedSubject | None:
        """The processes that the subject is divided over, if it is."""
        if self._spec.tensor_parallel == 1:
            return None
        if self._auto:
            # The largest size is found by running out of memory, which ends the processes.
            raise ConfigError(
                "subject.tensor_parallel with harvest.batch_windows: auto",
                expected="a number of windows",
                fix="Set harvest.batch_windows",
            )
        refuse_documents(self._plan.spec)  # of a plan on another's windows, only here
        return DividedSubject(self._as_planned, self._plan.spec.hooks, self._threads)

    @cached_property
    def _reader(self) -> Subject | EngineReader | DividedSubject:
        """What activations are read with: the subject itself, unless it is divided or has another engine."""
        if self._divided is not None:
            _ = self._subject  # its weights and widths are checked
            return self._divided
        # After the subject: on a GPU, an engine takes a share of what it leaves free.
        return reader_of(self._subject, self._plan.subject.engine, self._plan.spec.hooks)

    @cached_property
    def _check(self) -> EngineCheck | None:
        """The comparison with transformers, if something else reads."""
        if self._plan.subject.engine == "transformers":
            return None
        return EngineCheck(self._subject, self._subject.spec, self._plan.spec.drop_leading)

    def _check_width(self, hook: str, width: int) -> None:
        """Check that activations at `hook` are of the planned width; nothing is written otherwise.

        Raises:
            ConfigError: They are not.
        """
        if width != self._plan.d_model(hook):
            raise ConfigError(
                f"hook {hook!r}: the subject on this worker gives rows of another width",
                expected=f"D = {self._plan.d_model(hook)}, as planned",
                got=f"D = {width}",
                fix="Use the subject and the transformers of the plan",
            )

    def ready(self) -> str:
        """Load the subject and choose the batch, so that errors come before any unit.

        Returns:
            The device.
        """
        with self._lm:
            self._choose_batch()
            return str(self._reader.device)

    def _choose_batch(self) -> None:
        if not self._batch:
            chosen = choose_batch(self._store, self._plan, self._reader, self._threads)
            self._batch, self._batch_source = chosen

    def windows_done(self) -> int:
        """The number of windows run through the LM so far."""
        return self._windows_done

    def run(self, unit: int) -> UnitFacts:
        """Compute and commit one unit.

        Returns:
            Bytes and times, once the unit's receipt is in the store.

        Raises:
            ConfigError: An activation is not of the planned width, or another engine's differs from that of
                transformers; nothing was written.
            NonFiniteError: NaN or infinity in an activation, with unit, hook and window.
            IntegrityError, StoreError: From the store.
        """
        rows, attempt, tokens_sha256 = self.make(unit)
        with self._wait.commit():
            receipt = commit_unit(
                self._store, self._plan, unit, rows, tokens_sha256=tokens_sha256, attempt=attempt
            )
        # Only now: `commit_unit` needs them unchanged.
        self._spare.append(rows)
        stored = sum(shard.bytes for shard in receipt.shards.values())
        return UnitFacts(
            unit,
            stored,
            *self._wait.take(),
            batch_windows=attempt.batch_windows,
            batch_source=self._batch_source,
        )

    def make(self, unit: int) -> tuple[dict[str, NDArray[np.generic]], Attempt, str]:
        """Compute one unit without storing it.

        Returns:
            hook -> rows [R, D], the attempt, and the SHA-256 of the unit's tokens.
        """
        # The lock ends before the commit, which another unit's forward passes overlap.
        with self._lm:
            start = time.monotonic()
            with self._wait.tokens():
                tokens = read_tokens(self._store, self._plan, unit)
                positions = read_positions(self._store, self._plan, unit)
            with self._wait.lm():
                rows = self._rows(unit, tokens, positions)
            batch = self._batch
            farthest = None
            if self._check is not None:
                farthest = self._check.farthest
                self._check.end()
        attempt = Attempt(
            id=uuid.uuid4().hex,
            seconds=time.monotonic() - start,
            batch_windows=batch,
            threads=self._threads,
            device=str(self._subject.device),
            engine_difference=farthest,
            finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        return rows, attempt, hashlib.sha256(tokens.astype("<u4").tobytes()).hexdigest()

    def _rows(
        self, unit: int, tokens: NDArray[np.uint32], positions: NDArray[np.int64] | None
    ) -> dict[str, NDArray[np.generic]]:
        """Every hook's rows [R, D] of a unit, in stored order and dtype, all from passes of one shape."""
        # If memory runs out, the whole unit starts again: its last bits depend on the shape of the passes,
        # and the receipt records one shape for all of them.
        self._choose_batch()
        while True:
            before = self._windows_done
            try:
                return self._rows_once(unit, tokens, positions)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                reason = str(error).strip().splitlines()[0][:200]
            self._windows_done = before
            # Outside the except clause, where the error's frames no longer hold tensors of the failed pass.
            self._halve(unit, reason)

    def _halve(self, unit: int, reason: str) -> None:
        """Halve the windows per pass from here on.

        Raises:
            WorkerError: A single window was too much.
        """
        if self._batch == 1:
            T = self._plan.spec.context_length
            raise WorkerError(
                f"unit {unit}: memory ran out with a single window of {T} tokens",
                got=reason,
                fix="Give each actor more memory: fewer harvest.actors on a node, more "
                "harvest.gpus_per_actor, or a larger device",
            )
        self._batch //= 2
        self._batch_source = "halved, since memory ran out"
        free_memory(self._subject.device)
        log.warning("memory ran out: %d windows per pass from here (%s)", self._batch, reason)
        # A number in the config is the user's promise of a shape: it holds for this process only.
        if self._auto:
            record_smaller_batch(self._store, self._plan, self._subject.device, self._threads, self._batch)

    def _rows_once(
        self, unit: int, tokens: NDArray[np.uint32], positions: NDArray[np.int64] | None
    ) -> dict[str, NDArray[np.generic]]:
        plan, spec = self._plan, self._plan.spec
        # The inverse permutation (planned row -> stored row) puts each batch in its places as it comes; the
        # other way round, the unit's rows would be held twice.
        place = np.empty(plan.rows_per_unit, dtype=np.int64)
        place[row_permutation(plan, unit)] = np.arange(plan.rows_per_unit)
        rows = self._spare.pop() if self._spare else self._space()

        def put(first: int, take: Callable[[], list[torch.Tensor]], found: dict[str, torch.Tensor]) -> None:
            taken = take()
            for (hook, values), stored, finite in zip(
                found.items(), taken[: len(found)], taken[len(found) :], strict=True
            ):
                # A flag made on the device and copied with the rows: asking for it earlier would wait for the
                # device after every batch.
                if not finite:
                    raise self._not_finite(values, stored, unit, hook, first)
                start = first * plan.rows_per_window
                view = stored.view(torch.uint16) if spec.dtype == "bfloat16" else stored
                _as_items(rows[hook])[place[start : start + len(stored)]] = _as_items(view.numpy())

        if self._check is not None:
            self._check.begin()
        copies, last = CopyOut(self._subject.device), None
        for first in range(0, spec.windows_per_unit, self._batch):
            part = slice(first, first + self._batch)
            batch, places = tokens[part], None if positions is None else positions[part]
            found = self._reader.activations(batch, spec.hooks, positions=places)
            # In every pass, not once: assignment of rows as items would truncate or pad them silently.
            for hook, values in found.items():
                self._check_width(hook, values.shape[-1])
            if self._check is not None:
                self._check.compare(unit, first, batch, found)
            stored = [self._stored(values) for values in found.values()]
            copy = copies.start([*stored, *(all_finite(_telling(rows)) for rows in stored)])
            # One batch late, so that the host puts rows in their places while the device computes the next;
            # on a CPU that would only hold the rows of two batches.
            if last is not None:
                put(*last)
            last = first, copy, found
            if self._subject.device.type == "cpu":
                put(*last)
                last = None
            self._windows_done += len(batch)
            del found, stored, copy
        if last is not None:
            put(*last)
        return rows

    def _space(self) -> dict[str, NDArray[np.generic]]:
        plan, dtype = self._plan, STORED_DTYPES[self._plan.spec.dtype]
        return {
            hook: np.empty((plan.rows_per_unit, plan.stored_width(hook)), dtype) for hook in plan.spec.hooks
        }

    def _stored(self, values: torch.Tensor) -> torch.Tensor:
        """[W, T, D] as read -> [rows, D] as stored (`store.format.shards.Stored`), still on the device."""
        # Converted before the copy: half or a quarter of the bytes cross to the host.
        dtype = self._plan.spec.dtype
        kept = values[:, self._plan.spec.drop_leading :].to(_TORCH_DTYPES[dtype])
        return to_int8(kept) if dtype == "int8" else kept.reshape(-1, values.shape[-1]).contiguous()

    def _not_finite(
        self, values: torch.Tensor, stored: torch.Tensor, unit: int, hook: str, first: int
    ) -> NonFiniteError:
        """The error for stored rows [rows, D] that are not all finite; `values` [W, T, D] are those read."""
        dtype, drop = self._plan.spec.dtype, self._plan.spec.drop_leading
        row = int((~torch.isfinite(_telling(stored))).any(dim=1).nonzero()[0])
        window, position = divmod(row, self._plan.rows_per_window)
        # A finite activation that is infinite once stored has another remedy than NaN from the subject.
        overflow = bool(torch.isfinite(values[window, position + drop]).all())
        return NonFiniteError(
            f"unit {unit}, hook {hook}, window {first + window} of the unit, position {position + drop}",
            expected=f"finite {dtype} values",
            got=f"overflow of {dtype}" if overflow else "NaN or infinity from the subject",
            fix="Store bfloat16 or float32" if overflow else "Run the subject in float32",
        )
