"""`winnow index`: from a dataset and an SAE to a table of latents, in two steps that both resume.

1. *Map*: each unit's stored rows are encoded and written as a block, by latent and by row (`blocks`).
2. *Reduce*: for each part of the latents the pieces of all blocks are merged; since all activations of a
   latent are available, its figures, best windows and draws are exact (`latents`). A part is one Parquet
   file.

Stored rows are read instead of running the subject: they are verified, they are what the SAE was trained on,
and reading them costs a small share of what computing them did. Units and parts are independent of each
other, so any worker can make any of them (`crew`). Finished ones are kept, and the same command resumes
after a kill. `index.json` is written last.
"""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from winnow.common.reporter import say
from winnow.common.shared_files import locked, write_whole
from winnow.evaluator.families.diffing import relative_norms
from winnow.explorer.index import latents as per_latent
from winnow.explorer.index.blocks import Block, block_folder, firing_counts, make_block, merge
from winnow.explorer.index.directions import (
    nearest,
    principal,
    require_written,
    token_texts,
    unit_rows,
)
from winnow.explorer.index.parts import AXIS, index_parts
from winnow.explorer.index.promoted import promoted_columns
from winnow.explorer.index.subjects import LazySubject, lazy_subjects
from winnow.explorer.index.table import (
    COMPONENTS,
    GROUP_LATENTS,
    INDEX_KEY,
    PART_LATENTS,
    SCALARS,
    SUMMARY_KEY,
    SUMMARY_TOKENS,
    VOCABULARY_KEY,
    decode_table,
    encode_table,
    example_column,
    figure_columns,
    lists,
    part_key,
    read_index,
)
from winnow.sae.model import Sae, read_card
from winnow.schemas.base import Contract, Sha256
from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import ConfigError, MissingObject
from winnow.schemas.features import HEADS, FeatureIndex, IndexSpec, site_of
from winnow.schemas.fit import check_dataset
from winnow.schemas.subject import SubjectSpec
from winnow.schemas.window import WindowRule
from winnow.store import ActivationStore
from winnow.store.objects import ObjectStore, open_store
from winnow.store.read.joined import open_roots

_INPUTS_KEY = "making.json"
"""In the scratch folder: the inputs of the blocks and parts there."""

MakeAll = Callable[[str, list[int], Callable[[], object]], None]
"""Does the work: `make_all("block" or "part", numbers, done)` makes each and calls `done()` after it."""


class IndexInputs(Contract):
    """The inputs of an unfinished index, so that results of other inputs are not mixed into it."""

    spec: IndexSpec
    sae_sha256: Sha256
    plan_fingerprint: Sha256
    dataset_sha256: Sha256 | None


@dataclass(frozen=True)
class Recipe:
    """An index as names only, so that any process can open it; it holds no secret."""

    sae: str
    root: str
    out: str
    scratch: str | None
    spec: IndexSpec
    subject: SubjectSpec | None = None
    storage: StorageSpec = field(default_factory=StorageSpec)
    part_latents: int = PART_LATENTS
    roots: Mapping[str, str] | None = None
    """Of an SAE of several datasets: where they are; None takes those that its card names."""
    subjects: Mapping[str, str] = field(default_factory=dict[str, str])
    """Of such an SAE: where a subject's files are, if not where its plan says."""

    def open(self, subject: LazySubject | None = None) -> Indexer:
        """Open dataset, SAE and index; the subject is loaded when it is needed.

        Args:
            subject: The subject, if indexes that are made one after another share it.

        Raises:
            SaeMismatch: The dataset does not hold what the SAE reads.
            PlanMismatch: The datasets of an SAE of several are not aligned.
            ConfigError: The dataset's windows are no text, or the index is remote without a scratch folder.
            MissingObject, IntegrityError: The SAE does not exist or is damaged.
        """
        card = read_card(open_store(self.sae, self.storage), self.sae)
        named = (self.roots or card.roots) if "/" in card.hook else None
        dataset = open_roots(self.root, named, self.storage)
        for part in dataset.datasets:
            part.require_text()
        subjects = {"": subject} if subject else lazy_subjects(dataset.plan, self.subject, self.subjects)
        device = next(iter(subjects.values())).device
        sae = Sae.load(self.sae, device=device, storage=self.storage)
        store, scratch = open_index_store(self.out, self.scratch, self.storage)
        return Indexer(
            dataset, self.root, sae, store, scratch, self.spec, subjects, self.part_latents, named or {}
        )


@dataclass
class Indexer:
    """Makes one index.

    Args:
        dataset: The rows.
        root: The dataset's address, recorded in the index.
        sae: The SAE, on the device on which it runs.
        out: Receives the index.
        scratch: Folder for blocks, removed at the end.
        spec: What the index holds.
        subjects: Name of the dataset -> its subject; the name is empty if there is one dataset. Gives the
            texts of tokens and, unless `logits` is 0, the unembedding.
        part_latents: Latents per part.
        roots: Of several datasets: their addresses, recorded in the index.
    """

    dataset: ActivationStore
    root: str
    sae: Sae
    out: ObjectStore
    scratch: Path
    spec: IndexSpec
    subjects: Mapping[str, LazySubject]
    part_latents: int = PART_LATENTS
    roots: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        card, plan = self.sae.card, self.dataset.plan
        if card is None:
            raise ConfigError("sae", expected="a published SAE (`Sae.load`)", got="one without a card")
        self.card = card
        check_dataset("the SAE", card, plan)
        # Now, and not when all rows are encoded.
        if self.spec.logits:
            require_written(card.output_hooks)
        self.own = index_parts(card)
        rows = card.rows if self.spec.rows is None else self.spec.rows
        # Of all rows null stays null: an index that was made before rows could be chosen is the same.
        self.spec = self.spec.model_copy(update={"rows": None if rows.everything else rows})
        self.dataset = self.dataset.only(rows)
        # A row that is a sink of a target was not trained on either. Codes need no row of the targets, so a
        # dataset without them can be indexed.
        self.hooks = [*card.input_hooks, *(hook for hook in card.target_hooks if hook in plan.spec.hooks)]
        self.units = min(self.spec.units or plan.units, plan.units)
        self.parts = -(-card.latents // self.part_latents)
        self.inputs = IndexInputs(
            spec=self.spec,
            sae_sha256=card.weights_sha256,
            plan_fingerprint=plan.fingerprint,
            dataset_sha256=self.dataset.dataset_sha256,
        )

    def finished(self) -> FeatureIndex | None:
        """The existing index; None if there is none.

        Raises:
            ConfigError: The existing index was made of other inputs, or lists wrong promoted tokens.
        """
        try:
            meta = read_index(self.out)
        except MissingObject:
            return None
        there = IndexInputs(**{name: getattr(meta, name) for name in IndexInputs.model_fields})
        self._same(there, f"{self.out.uri} holds another index")
        return meta

    def run(
        self, progress: Callable[[str, int, int], object] = lambda *_: None, make_all: MakeAll | None = None
    ) -> FeatureIndex:
        """Make the index, or what is missing of it.

        Args:
            progress: Called as `progress(step, done, total)` with `units` and then `latents`; the first call
                of a step reports what existed already.
            make_all: Makes units and parts; None makes them in this process, one after another.
        """
        meta = self.finished()
        if meta is not None:
            return meta
        # Of two commands at once the second would delete the parts that the first has just made, and the
        # first the blocks that the second is making.
        with locked(self.scratch, lambda: say(f"another process is making {self.out.uri}: waiting for it")):
            return self.finished() or self._make(progress, make_all or self._alone)

    def _make(self, progress: Callable[[str, int, int], object], make_all: MakeAll) -> FeatureIndex:
        # Before the first block: workers compare the mark with their own inputs (`require_claim`).
        self._claim()
        missing = [unit for unit in range(self.units) if not block_folder(self.scratch, unit).exists()]
        self._step(make_all, "block", missing, lambda left: progress("units", self.units - left, self.units))
        # A part needs every block: one latent's activations are spread over all units.
        missing = [part for part in range(self.parts) if self.out.size(part_key(part)) is None]
        total = self.card.latents
        self._step(
            make_all,
            "part",
            missing,
            lambda left: progress("latents", total - min(left * self.part_latents, total), total),
        )
        meta = self._finish()
        # The cached blocks and the closure over them keep the scratch files mapped, and their space in use.
        self.__dict__.pop("_blocks", None)
        self.__dict__.pop("_part", None)
        # Only after `index.json`: a kill before it resumes from the blocks.
        shutil.rmtree(self.scratch, ignore_errors=True)
        return meta

    @staticmethod
    def _step(make_all: MakeAll, step: str, todo: list[int], show: Callable[[int], object]) -> None:
        left = len(todo)

        def done() -> None:
            nonlocal left
            left -= 1
            show(left)

        # Also called if nothing is missing, so that a resumed command reports a complete step.
        show(left)
        make_all(step, todo, done)

    def _alone(self, step: str, todo: list[int], done: Callable[[], object]) -> None:
        for number in todo:
            self.make(step, number)
            done()

    def make(self, step: str, number: int) -> None:
        """Make the `block` of a unit or, once all blocks exist, a `part` of the latents."""
        if step == "block":
            make_block(self.dataset, self.sae, self.hooks, number, self.scratch)
        else:
            self.out.put(part_key(number), self._part(number))

    @cached_property
    def _blocks(self) -> list[Block]:
        return [Block.open(block_folder(self.scratch, unit)) for unit in range(self.units)]

    # Cached: the maker loads the subject and normalises all decoder rows, once for all parts of a worker.
    @cached_property
    def _part(self) -> Callable[[int], bytes]:
        return self.part_maker(self._blocks)

    def part_maker(self, blocks: list[Block]) -> Callable[[int], bytes]:
        """A function from a part's number to its Parquet bytes."""
        counts = firing_counts(blocks)
        windows = per_latent.Windows([block.tokens for block in blocks], self.dataset.plan.spec.drop_leading)
        W_dec = self.sae.W_dec.detach()
        # A second copy of the decoder (3.2 GB at N = 1,048,576, D = 768), so only if cosines are wanted.
        directions = unit_rows(W_dec.float()) if self.spec.neighbours else W_dec
        promoted = promoted_columns(self.sae, self.card, self.subjects, self.spec.logits)

        def make(number: int) -> bytes:
            first = number * self.part_latents
            stop = min(first + self.part_latents, self.card.latents)
            start, row, value = merge(blocks, first, stop)
            columns = {"latent": pa.array(np.arange(first, stop), pa.uint32())}
            columns |= self._activity(start, row, value, first, windows)
            columns["enc_dec_cosine"] = pa.array(self._enc_dec_cosine(first, stop), pa.float32())
            # Columns that were not asked for are absent, not empty: readers use `row.get(name, [])`.
            columns |= promoted(first, stop)
            if self.spec.neighbours:
                near = nearest(directions, first, stop, self.spec.neighbours)
                together = per_latent.coactive(blocks, start, row, counts, first, self.spec)
                for name, each in (("cosine", near), ("coactive", together)):
                    columns[f"{name}_ids"] = lists(each.ids, pa.uint32())
                    # `lists` cuts ids at -1 by itself; scores have no such filler, so the ids decide.
                    columns[f"{name}_scores"] = lists(
                        [s[i >= 0] for s, i in zip(each.scores, each.ids, strict=True)], pa.float32()
                    )
            return encode_table(columns, GROUP_LATENTS)

        return make

    def _activity(
        self,
        start: NDArray[np.int64],
        row: NDArray[np.int64],
        value: NDArray[np.float32],
        first: int,
        windows: per_latent.Windows,
    ) -> dict[str, Any]:
        figures: list[per_latent.Figures] = []
        examples: list[per_latent.Examples] = []
        # Per latent in Python: quantiles, draws and peaks are ragged, and a part has 1,024 latents at most.
        for i in range(len(start) - 1):
            mine = slice(start[i], start[i + 1])
            window, at = np.divmod(row[mine], windows.rows)
            # Rows are numbered without the dropped leading positions, tokens with them.
            tokens = windows.of(window, at + windows.drop)
            active = value[mine] if value.ndim == 1 else value[mine, 0]
            figures.append(per_latent.figures(active, tokens, self.spec.bands))
            choice = per_latent.choose(row[mine], active, self.spec, windows.rows, first + i)
            examples.append(per_latent.examples(row[mine], value[mine], choice, self.spec, windows))
        return figure_columns(figures) | {"examples": example_column(examples)}

    def _enc_dec_cosine(self, first: int, stop: int) -> NDArray[np.float32]:
        # Of a layer of a cross-layer set, what its latents write to their own layer.
        own = (self.sae.parts.target_widths or (self.sae.d_out,))[0]
        if own != self.sae.d_model:
            return np.zeros(stop - first, np.float32)
        rows = torch.nn.functional.cosine_similarity(
            self.sae.W_enc[first:stop], self.sae.W_dec[first:stop, :own]
        )
        return rows.detach().float().cpu().numpy()

    def require_claim(self) -> None:
        """Check that this process sees the scratch folder that the driver has marked.

        Raises:
            ConfigError: It sees none, or another index's.
        """
        # A folder of the same name on another node passes every other check, and its blocks would be lost.
        mark = self.scratch / _INPUTS_KEY
        if not mark.exists() or mark.read_bytes() != self.inputs.canonical():
            raise ConfigError(
                f"scratch folder {self.scratch} on a worker",
                expected="the one that the command has marked: workers write their results to it",
                got="another" if mark.exists() else "none",
                fix="Name a folder that every node sees with --scratch, or use one node",
            )

    def _claim(self) -> None:
        """Mark the scratch folder as this index's, or refuse another index's."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        mark = self.scratch / _INPUTS_KEY
        if mark.exists():
            there = IndexInputs.model_validate_json(mark.read_bytes())
            self._same(there, f"{self.scratch} holds another, unfinished index")
            return
        # Parts without a mark belong to an index whose scratch folder is gone: nothing says of which inputs,
        # and `run` would keep them as finished. They are deleted before the mark allows them to be kept.
        for key, _ in list(self.out.list("latents")):
            self.out.delete(key)
        write_whole(mark, self.inputs.canonical())

    def _same(self, there: IndexInputs, what: str) -> None:
        if there != self.inputs:
            mine, other = self.inputs.model_dump(), there.model_dump()
            differing = [name for name in mine if mine[name] != other[name]]
            raise ConfigError(
                what,
                expected=str({name: mine[name] for name in differing}),
                got=str({name: other[name] for name in differing}),
                fix="Name another folder with --out, or delete this one",
            )

    def _finish(self) -> FeatureIndex:
        # `index.json` is written last: until it exists `FeatureTable.open` refuses the folder as unfinished.
        plan = self.dataset.plan
        self.out.put(SUMMARY_KEY, self._summary())
        # Aligned datasets have one vocabulary: any of the subjects tells the texts.
        texts = token_texts(next(iter(self.subjects.values())).tokenizer, plan.subject.vocabulary)
        self.out.put(VOCABULARY_KEY, encode_table({"text": pa.array(texts, pa.string())}, len(texts)))
        meta = FeatureIndex(
            **self.inputs.model_dump(),
            hook=self.card.hook,
            target_hooks=self.card.target_hooks,
            parts=self.own,
            d_model=self.card.d_model,
            latents=self.card.latents,
            part_latents=self.part_latents,
            group_latents=GROUP_LATENTS,
            root=self.root,
            roots=dict(self.roots),
            subject=plan.subject,
            subjects={name: each.planned for name, each in self.subjects.items() if name},
            context_length=plan.spec.context_length,
            drop_leading=plan.spec.drop_leading,
            sink_multiple=plan.spec.sink_multiple,
            window=WindowRule.of(plan),
            projected=self.spec.logits > 0 and HEADS in map(site_of, self.card.output_hooks),
            windows=self.units * plan.spec.windows_per_unit,
            # Rows of weight above 0, not windows x T: densities are shares of what the SAE was trained on.
            rows=int(sum(int(block.read.sum()) for block in self._blocks)),
            bin_count=per_latent.BINS,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        self.out.put(INDEX_KEY, meta.to_json())
        return meta

    def _summary(self) -> bytes:
        """Scalars and first tokens of all latents, gathered from the parts."""
        # Read back from the parts rather than kept while they are made: after a resume, or with several
        # workers, most parts were made by another process.
        tables: list[Any] = []
        stored = [name for name in SCALARS if name not in ("token_share", "logit_peak")]
        wanted = [*stored, "token_ids", "token_shares"]
        wanted += ["promoted_ids", "promoted_logits"] if self.spec.logits else []
        for number in range(self.parts):
            key = part_key(number)
            part = decode_table(self.out.get(key), key, wanted)
            columns = {name: part.column(name) for name in stored}
            columns["token_share"] = _firsts(part.column("token_shares"))
            columns["logit_peak"] = _firsts(
                part.column("promoted_logits") if self.spec.logits else None, part
            )
            columns["token_ids"] = _heads(part.column("token_ids"))
            columns["promoted"] = _heads(part.column("promoted_ids") if self.spec.logits else None, part)
            tables.append(pa.table(columns))
        columns = _columns(pa.concat_tables(tables))
        found = principal(self.sae.W_dec.detach())
        if found is not None:
            columns |= {name: pa.array(found[:, i]) for i, name in enumerate(COMPONENTS)}
        if self.own:
            # A latent without any direction is nobody's: 0 in every part, as JSON has no NaN.
            norms = relative_norms(self.sae).nan_to_num().float().cpu().numpy()
            columns |= {AXIS + part.name: pa.array(norms[:, i]) for i, part in enumerate(self.own)}
        # One row group: the server reads the whole summary at its start.
        return encode_table(columns, self.card.latents)


def _columns(table: Any) -> dict[str, Any]:
    return {name: table.column(name).combine_chunks() for name in table.column_names}


def _firsts(column: Any, like: Any = None) -> Any:
    """First entry of each list, 0 if it is empty; zeros of the length of `like` if there is no column."""
    if column is None:
        assert like is not None
        return pa.array(np.zeros(like.num_rows), pa.float32())
    return pa.array([each[0] if each else 0.0 for each in column.to_pylist()], pa.float32())


def _heads(column: Any, like: Any = None) -> Any:
    """The first entries of each list; empty lists, one per row of `like`, if there is no column."""
    if column is None:
        assert like is not None
        return pa.array([[]] * like.num_rows, pa.list_(pa.uint32()))
    return pa.array([each[:SUMMARY_TOKENS] for each in column.to_pylist()], pa.list_(pa.uint32()))


def open_index_store(
    out: str, scratch: str | None, storage: StorageSpec | None = None
) -> tuple[ObjectStore, Path]:
    """The index's store, and the scratch folder: the one that is named, or one inside a local index."""
    store = open_store(out, storage)
    if scratch is not None:
        return store, Path(scratch)
    # Blocks are mapped from disk by latent and by row, which an object store cannot serve.
    if "://" in out and not out.startswith("file://"):
        raise ConfigError(
            "--scratch", expected="a local folder, since the index itself is not local", got="nothing"
        )
    return store, Path(out.removeprefix("file://")) / "scratch"
