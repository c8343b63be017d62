"""One pass from the corpus to its token windows: read, tokenise, hold out, pack, spill.

Letters: T context length, W windows per unit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Self

import numpy as np
from numpy.typing import NDArray

from winnow.common.hashing import keyed_hash
from winnow.harvester.plan.chat import template_digests
from winnow.harvester.plan.corpus import documents
from winnow.harvester.plan.digests import MakeUnit, PlanDigests, PlannedUnit, digests_of
from winnow.harvester.plan.marks import labels_of
from winnow.harvester.plan.packing import (
    Holdout,
    Numbered,
    Packer,
    Tokens,
    Windows,
    holdout_key,
    in_keyed_order,
    order_key,
    regroup,
)
from winnow.harvester.plan.sources import SourceFile
from winnow.harvester.plan.spill import WindowSpill, bucket_count, check_space, record_bytes
from winnow.harvester.plan.tally import Tally
from winnow.harvester.plan.tokenise import DocumentTokenizer, tokenised
from winnow.schemas.corpus import CorpusSpec
from winnow.schemas.errors import ConfigError
from winnow.schemas.harvest import CorpusFacts, PlanSpec

TOKENS_PER_BYTE = 0.3
"""Tokens per byte of plain text, for the first forecast; after `MEASURE_BYTES` the measured rate counts."""
PACKED = 4
"""Assumed ratio of compressed files, for the number of buckets only; never a reason to refuse."""
MEASURE_BYTES = 16 * 2**20

ProgressCallback = Callable[..., object]
"""Called as `progress(tokens, **facts)`: tokens so far, and facts (text) to show beside them."""


class PlanProgress:
    """Passes facts to the callback, at most once per second; knows how much of the corpus is read."""

    def __init__(self, callback: ProgressCallback | None, files: list[SourceFile]) -> None:
        self._callback, self._last = callback, float("-inf")
        sizes = [file.size for file in files]
        self.total = None if None in sizes else sum(size or 0 for size in sizes)
        self._start = time.monotonic()

    def read(self, tokens: int, tally: Tally) -> None:
        """Report how much of the corpus is read."""
        if self._due():
            facts = {"documents": f"{tally.documents:,}"}
            if self.total:
                share = min(tally.bytes_done / self.total, 1.0)
                facts["read"] = f"{share:.0%}"
                if share > 0:
                    seconds = int((time.monotonic() - self._start) * (1 - share) / share)
                    facts["left"] = f"{seconds // 60}:{seconds % 60:02d}"
            self._call(tokens, facts)

    def put(self, tokens: int, done: int, total: int) -> None:
        """Report how many token chunks are stored."""
        # The last one always, so that a bar ends at 100 %.
        if self._due() or done == total:
            self._call(tokens, {"chunks": f"{done:,}/{total:,}"})

    def _due(self) -> bool:
        return self._callback is not None and time.monotonic() - self._last >= 1.0

    def _call(self, tokens: int, facts: dict[str, str]) -> None:
        self._last = time.monotonic()
        if self._callback is not None:
            self._callback(tokens, **facts)


@dataclass
class _Split:
    """Windows cut and planned, and stream tokens left over, of one split."""

    windows: int = 0
    planned: int = 0
    tail: int = 0


class CorpusWindows:
    """One pass over a corpus: the spilled training windows, the held-out ones in memory, and the counts."""

    def __init__(
        self,
        corpus: CorpusSpec,
        spec: PlanSpec,
        tokenizer: DocumentTokenizer,
        files: list[SourceFile],
        folder: str,
        progress: PlanProgress,
    ) -> None:
        self._corpus, self._spec, self._tokenizer, self._files = corpus, spec, tokenizer, files
        self._folder, self._progress = folder, progress
        self._by_document = spec.split_by == "document"
        self._order, self._holdout_key = order_key(spec.seed), holdout_key(spec.seed)
        self._tally, self._ordinal = Tally(), 0
        self.tokens = 0
        """Tokens of all documents so far, including those that join them."""
        self._validation, self._train = _Split(), _Split()
        self._packer, self._held_packer = self._new_packer(), self._new_packer()
        self._held_windows: Windows = np.empty(0, self._packer.dtype)
        # With split_by: window, the validation units are the first windows of the same order.
        wanted = spec.train_units
        if wanted is not None and not self._by_document:
            wanted += spec.validation_units
        self._record_bytes = record_bytes(self._packer.dtype)
        try:
            # With train_units, what is kept is bounded however large the corpus is. Compressed sizes count
            # once, since a guess must not refuse a plan that would fit.
            if wanted is None:
                check_space(folder, self._forecast(packed=1) or 0, "the planner's spill file")
            self._spill = WindowSpill(
                self._packer.dtype,
                self._order,
                folder=folder,
                buckets=bucket_count(self._forecast(PACKED)),
                keep=wanted * spec.windows_per_unit if wanted is not None else None,
            )
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise ConfigError(
                "harvest.temp_dir",
                expected="a local folder that can be written",
                got=f"{folder} ({error.strerror})",
                fix="Create it, or name another",
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._spill.__exit__(None, None, None)

    def read(self) -> None:
        """Read, tokenise, pack and spill the whole corpus."""
        spec = self._spec
        held_out = spec.validation_units * spec.windows_per_unit
        tokenizer = self._tokenizer
        own = None if tokenizer.bos_twice else tokenizer.bos
        holdout = Holdout(held_out * self._packer.payload if self._by_document else 0, own)
        texts = documents(self._corpus, self._tally, self._files, tokenizer.templates, tokenizer.rules)
        checked = MEASURE_BYTES
        with closing(tokenised(texts, tokenizer)) as stream:
            for batch in stream:
                self._spill.add(self._packer.push(self._for_training(batch, holdout)))
                self._progress.read(self.tokens, self._tally)
                # At doubling sizes: the disk is found too small early, not after hours of reading.
                if self._tally.bytes_done >= checked:
                    self._check_measured()
                    checked = 2 * self._tally.bytes_done
        self._train = _Split(windows=self._spill.windows, tail=len(self._packer.tail))
        # A stream of their own, so that no window holds text of both splits.
        if self._by_document:
            held = self._held_packer
            self._held_windows = in_keyed_order(held.push(holdout.documents()), self._order)
            self._validation = _Split(windows=len(self._held_windows), tail=len(held.tail))
        self._divide(held_out)

    def _new_packer(self) -> Packer:
        tokenizer = self._tokenizer
        length, bos = self._spec.context_length, tokenizer.bos
        return Packer(length, bos, tokenizer.dtype, tokenizer.turns, twice=tokenizer.bos_twice)

    def _for_training(self, documents: list[Tokens], holdout: Holdout) -> Iterable[Numbered]:
        """Count `documents`; return those that go to training now, with those that the hold-out releases."""
        self.tokens += sum(len(tokens) for tokens in documents)
        numbers = np.arange(self._ordinal, self._ordinal + len(documents))
        self._ordinal += len(documents)
        if not self._by_document:
            return zip(numbers.tolist(), documents, strict=True)
        # By ordinal: the choice follows from the seed and the order of the documents alone.
        hashes = keyed_hash(numbers, self._holdout_key)
        offered = zip(numbers.tolist(), hashes.tolist(), documents, strict=True)
        return chain.from_iterable(holdout.push(*entry) for entry in offered)

    def _divide(self, held_out: int) -> None:
        """Decide how many units there are, or raise if there are too few."""
        spec, size = self._spec, self._spec.windows_per_unit
        if not self._by_document:
            self._validation.windows = min(held_out, self._train.windows)
            self._train.windows -= self._validation.windows
        units = self._train.windows // size
        if self._validation.windows < held_out or units < 1:
            needed = (spec.validation_units + 1) * size * self._packer.payload
            raise ConfigError(
                "the corpus is too small for plan.validation_units and one training unit",
                expected=f"at least {needed:,} tokens ({spec.validation_units + 1} units x {size} windows x "
                f"{self._packer.payload}) and what whole documents leave over",
                got=f"{self.tokens:,} tokens in {self._tally.documents:,} documents",
                fix="Lower plan.windows_per_unit (a multiple of 64) or plan.validation_units, or add text; "
                "if there are only a few long documents, lower corpus.max_document_chars",
            )
        if spec.train_units is not None and units < spec.train_units:
            raise ConfigError(
                "plan.train_units is more than the corpus holds",
                expected=f"at most {units}",
                got=f"{spec.train_units} ({self.tokens:,} tokens in all)",
                fix="Lower plan.train_units, set it to null to take the whole corpus, or add text",
            )
        self._validation.planned = held_out
        self._train.planned = (spec.train_units or units) * size

    def units(self) -> Iterator[PlannedUnit]:
        """Yield every planned unit, the validation units first."""
        return (make() for make in self.makers())

    def makers(self) -> Iterator[MakeUnit]:
        """Yield what makes each planned unit, the validation units first; threads may call it."""
        # Read anew from the spill at each call: once for the digests, once for the chunks. The plan with the
        # digest of all tokens has to be stored before the first chunk.
        size = self._spec.windows_per_unit
        held = self._validation.planned // size if self._by_document else 0
        total = (self._validation.planned + self._train.planned) // size
        self._tally.begin_source(len(self._corpus.sources) - 1)
        starts = np.array(self._tally.source_starts, np.uint64)
        lead = self._packer.context_length - self._packer.payload
        for packer, parts in (
            (self._held_packer, regroup([self._held_windows], size, held)),
            (self._packer, regroup(self._spill.ordered(), size, total - held)),
        ):
            documents = np.array(packer.documents, np.uint64)
            for part in parts:
                yield partial(_planned, part, lead, documents, starts)

    def digests(self) -> PlanDigests:
        """The digests of all units, and the counts of their labels."""
        roles, sources = tuple(self._tokenizer.roles), len(self._corpus.sources)
        own = self._packer.own + self._held_packer.own > 0
        return digests_of(self.makers(), roles, sources, own_bos=own)

    def facts(self) -> CorpusFacts:
        """What was read, and everything left over."""
        splits = (self._validation, self._train)
        return CorpusFacts(
            sha256=self._tally.sha256(),
            documents=self._tally.documents,
            tokens=self.tokens,
            duplicates_dropped=self._tally.duplicates,
            bad_records=self._tally.bad,
            bad_first=tuple(self._tally.bad_first),
            templates=template_digests(self._tokenizer.templates),
            windows_unused=sum(split.windows - split.planned for split in splits),
            tokens_unused=sum(split.tail for split in splits),
        )

    def _forecast(self, packed: int) -> int | None:
        """Bytes of the spill file, if compressed files unpack to `packed` times their size.

        None if a file system does not tell sizes.
        """
        if self._progress.total is None:
            return None
        text = sum(
            (file.size or 0) * (packed if file.compression or file.format == "parquet" else 1)
            for file in self._files
        )
        return int(text * TOKENS_PER_BYTE / self._packer.payload * self._record_bytes)

    def _check_measured(self) -> None:
        """Check by the measured rate that the rest of the spill file fits; StoreError if not."""
        if self._progress.total and self._spec.train_units is None:
            share = min(self._tally.bytes_done / self._progress.total, 1.0)
            needed = int(self._spill.windows * self._record_bytes / share) - self._spill.bytes
            check_space(self._folder, needed, "the rest of the planner's spill file")


def _planned(
    windows: Windows, lead: int, documents: NDArray[np.uint64], source_starts: NDArray[np.uint64]
) -> PlannedUnit:
    return PlannedUnit(windows["token"].astype("<u4"), labels_of(windows, lead, documents, source_starts))
