"""The index on disk: Parquet, one row per latent, and the reader that pages use.

A part holds `part_latents` latents in row groups of `group_latents`; a page reads one row group. Page
checksums are written and verified.
"""

from __future__ import annotations

import io
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from winnow.explorer.index.latents import Examples, Figures
from winnow.sae.model import require_some_sae
from winnow.schemas.base import Sha256, validate
from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import ConfigError, IntegrityError, MissingObject
from winnow.schemas.features import Explanation, FeatureIndex
from winnow.store.objects import ObjectStore, open_store

INDEX_KEY = "index.json"
SUMMARY_KEY = "summary.parquet"
VOCABULARY_KEY = "vocabulary.parquet"
_EXPLANATIONS_KEY = "explanations.jsonl"
# A part is what one worker holds in memory: its share of all codes, and co-activation (docs/explorer.md,
# "Memory"). A row group is what one page reads: 15 ms at the 95th percentile (benchmarks/explorer.py).
PART_LATENTS, GROUP_LATENTS = 1024, 16
SUMMARY_TOKENS = 6
"""Promoted and firing tokens per latent in the summary."""
# Neighbouring latents share a part, so paging through them parses its footer once.
_CACHED_FOOTERS = 64
# The server loads the summary and the explanations whole; a larger file would exhaust its memory.
_MAX_TABLE_BYTES = 1 << 32
_MAX_EXPLANATIONS_BYTES = 1 << 28

SCALARS = ("fires", "largest", "mean", "mean_square", "enc_dec_cosine", "token_share", "logit_peak")
"""Columns of the summary that are numbers."""
COMPONENTS = ("direction_1", "direction_2")
"""Further columns: the decoder row along two principal components of all; absent in older indexes."""


def read_index(store: ObjectStore) -> FeatureIndex:
    """`index.json` of a folder.

    Raises:
        ConfigError: It is of an earlier version and lists wrong promoted tokens.
        MissingObject: There is none.
        IntegrityError, UnsupportedVersion: It cannot be read.
    """
    meta = FeatureIndex.from_json(store.get(INDEX_KEY), origin=f"{store.uri}/{INDEX_KEY}")
    if (hook := meta.misread_hook) is not None:
        raise ConfigError(
            f"{store.uri} lists wrong promoted tokens: an earlier version took the rows at {hook} for "
            "directions of the residual stream",
            fix="Delete this folder and run `winnow index` again",
        )
    return meta


def part_key(part: int) -> str:
    """Key of a part of the latents."""
    return f"latents/part-{part:05d}.parquet"


def lists(rows: Sequence[NDArray[Any]] | NDArray[Any], kind: Any) -> Any:
    """A column of lists, one per latent; negative integers of a 2-d array are padding and left out."""
    if isinstance(rows, np.ndarray):
        rows = [row[row >= 0] if row.dtype.kind == "i" else row for row in rows]
    ends = np.cumsum([0, *(len(row) for row in rows)]).astype(np.int32)
    flat = np.concatenate(rows) if len(rows) else np.zeros(0)
    return pa.ListArray.from_arrays(ends, pa.array(flat, type=kind))


def example_column(found: Sequence[Examples]) -> Any:
    """The column `examples`: a list of structs per latent."""
    # From flat arrays and offsets: a part has up to 1.4 million tokens of examples (1,024 latents, 36 of 37).
    joined = Examples(*(np.concatenate(column) for column in zip(*found, strict=True)))
    ends = np.cumsum([0, *joined.length]).astype(np.int32)

    def inner(values: NDArray[Any], kind: Any) -> Any:
        return pa.ListArray.from_arrays(ends, pa.array(values, type=kind))

    columns = {
        "band": pa.array(joined.band, pa.int8()),
        "window": pa.array(joined.window, pa.uint32()),
        "position": pa.array(joined.position, pa.uint32()),
        "first": pa.array(joined.first, pa.uint32()),
        "tokens": inner(joined.tokens, pa.uint32()),
    }
    # Of a crosscoder: the activation, and then what each part contributes to it.
    values = joined.values if joined.values.ndim == 2 else joined.values[:, None]
    for number, column in enumerate(np.ascontiguousarray(values.T)):
        columns[f"part_{number - 1}" if number else "values"] = inner(column, pa.float32())
    structs = pa.StructArray.from_arrays(list(columns.values()), names=list(columns))
    outer = np.cumsum([0, *(len(each.band) for each in found)]).astype(np.int32)
    return pa.ListArray.from_arrays(outer, structs)


def figure_columns(found: Sequence[Figures]) -> dict[str, Any]:
    """The columns that come from `latents.figures`."""
    columns: dict[str, Any] = {"fires": pa.array([each.fires for each in found], pa.uint64())}
    for name in ("largest", "mean", "mean_square"):
        columns[name] = pa.array([getattr(each, name) for each in found], pa.float32())
    columns["quantiles"] = lists([each.quantiles for each in found], pa.float32())
    columns["histogram"] = lists([each.histogram for each in found], pa.uint32())
    columns["token_ids"] = lists([each.token_ids for each in found], pa.uint32())
    columns["token_shares"] = lists([each.token_shares for each in found], pa.float32())
    return columns


def encode_table(columns: Mapping[str, Any], group: int) -> bytes:
    """A Parquet file with page checksums."""
    # Objects outside the store's manifests have no digest; Parquet's own checksums detect damaged pages.
    sink = io.BytesIO()
    pq.write_table(
        pa.table(dict(columns)), sink, row_group_size=group, compression="zstd", write_page_checksum=True
    )
    return sink.getvalue()


def decode_table(data: bytes, origin: str, columns: Sequence[str] | None = None) -> Any:
    """Read a whole Parquet file.

    Raises:
        IntegrityError: It is damaged or not Parquet.
    """
    try:
        return pq.read_table(
            pa.BufferReader(data), columns=list(columns) if columns else None, page_checksum_verification=True
        )
    except (pa.ArrowException, OSError) as error:
        raise IntegrityError(f"{origin} is not readable Parquet", got=str(error)[:200]) from error


class _Ranges(io.RawIOBase):
    """An object as a file for Arrow: every read is one range request, and nothing is buffered."""

    def __init__(self, store: ObjectStore, key: str) -> None:
        super().__init__()
        self._store, self._key, self._at = store, key, 0
        size = store.size(key)
        if size is None:
            raise MissingObject(f"{store.uri} lacks a part of its index", expected=key, fix="Index again")
        self._size = size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        # Cut at the end of the object: stores refuse ranges beyond it, and a file's `read` may be short.
        end = self._size if size < 0 else min(self._at + size, self._size)
        data = bytes(self._store.get_range(self._key, self._at, end)) if end > self._at else b""
        self._at = end
        return data


class FeatureTable:
    """A finished index. Safe to use from threads; open one with `FeatureTable.open`.

    Attributes:
        store: Holds its files.
        meta: Its `index.json`.
        texts: Text of every token id.
        summary: One row per latent: `SCALARS`, `promoted` and `token_ids` (lists of ids).
        explanations: Explanations of latents that have any.
    """

    def __init__(self, store: ObjectStore, meta: FeatureIndex) -> None:
        self.store, self.meta = store, meta
        vocabulary = decode_table(store.get(VOCABULARY_KEY, _MAX_TABLE_BYTES), VOCABULARY_KEY)
        self.texts: list[str] = vocabulary.column("text").to_pylist()
        self.summary = decode_table(store.get(SUMMARY_KEY, _MAX_TABLE_BYTES), SUMMARY_KEY).combine_chunks()
        if self.summary.num_rows != meta.latents:
            raise IntegrityError(SUMMARY_KEY, expected=f"{meta.latents} rows", got=self.summary.num_rows)
        self.explanations = _read_explanations(store, meta.latents)
        self._footers: OrderedDict[int, pq.FileMetaData] = OrderedDict()
        # Requests for pages run in a pool of threads; trimming must not meet another thread's insertion.
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls, uri: str, storage: StorageSpec | None = None, *, sae_sha256: Sha256 | None = None
    ) -> FeatureTable:
        """Open the index at `uri`.

        Args:
            uri: Its folder or prefix.
            storage: Credentials and endpoint.
            sae_sha256: Digest of the weights that it must belong to; None accepts any.

        Raises:
            NoSae: No index there, and no SAE that it would be of.
            ConfigError: No finished index there, another SAE's, or one that lists wrong promoted tokens.
            IntegrityError, UnsupportedVersion: It cannot be read.
        """
        store = open_store(uri, storage)
        try:
            meta = read_index(store)
        except MissingObject as error:
            # The folder of an index is `features` in that of its SAE, unless another was named.
            sae, _, own = uri.rstrip("/").rpartition("/")
            if own == "features":
                require_some_sae(open_store(sae, storage), sae)
            fix = f"Run `winnow index {sae if sae and own == 'features' else 'SAE'}` first"
            raise ConfigError(f"{uri} holds no finished index", expected=INDEX_KEY, fix=fix) from error
        if sae_sha256 not in (None, meta.sae_sha256):
            raise ConfigError(
                f"{uri} is the index of another SAE",
                expected=f"weights {sae_sha256}",
                got=meta.sae_sha256,
                fix="Index this SAE, or name its index with --index",
            )
        return cls(store, meta)

    def latent(self, number: int) -> dict[str, Any]:
        """One latent's row as plain values; reads one row group.

        Raises:
            ConfigError: No such latent.
        """
        if not 0 <= number < self.meta.latents:
            raise ConfigError("latent", expected=f"0 to {self.meta.latents - 1}", got=number)
        # By the sizes that the index records, not today's constants: an older index keeps its own.
        part, within = divmod(number, self.meta.part_latents)
        group, row = divmod(within, self.meta.group_latents)
        source = _Ranges(self.store, part_key(part))
        try:
            with pq.ParquetFile(
                source, metadata=self._footers.get(part), page_checksum_verification=True
            ) as file:
                self._remember(part, file.metadata)
                # One row group has nothing to read in parallel; threads would only compete between requests.
                found = file.read_row_group(group, use_threads=False).slice(row, 1).to_pylist()[0]
        except (pa.ArrowException, OSError, IndexError) as error:
            raise IntegrityError(f"{part_key(part)}, latent {number}", got=str(error)[:200]) from error
        # Checksums do not notice parts that were exchanged or belong to another division.
        if found.pop("latent") != number:
            raise IntegrityError(f"{part_key(part)}: latents are not where they belong", expected=number)
        return found

    def _remember(self, part: int, footer: Any) -> None:
        with self._lock:
            self._footers[part] = footer
            while len(self._footers) > _CACHED_FOOTERS:
                self._footers.popitem(last=False)

    def column(self, name: str) -> NDArray[Any]:
        """A numeric column of the summary, [N]."""
        return cast(Any, self.summary.column(name)).to_numpy()

    def density(self) -> NDArray[np.float64]:
        """Share of rows on which each latent is active, [N]."""
        return self.column("fires") / max(self.meta.rows, 1)


def _read_explanations(store: ObjectStore, latents: int) -> dict[int, list[Explanation]]:
    found: dict[int, list[Explanation]] = {}
    if store.size(_EXPLANATIONS_KEY) is None:
        return found
    for number, line in enumerate(store.get(_EXPLANATIONS_KEY, _MAX_EXPLANATIONS_BYTES).splitlines(), 1):
        origin = f"{_EXPLANATIONS_KEY}, line {number}"
        try:
            one = validate(Explanation, json.loads(line), origin=origin)
        except ValueError as error:
            raise IntegrityError(f"{origin} is no explanation", got=str(error)[:200]) from error
        # The file is anybody's to write: a line on a latent that does not exist has no page, and is skipped.
        if one.latent < latents:
            found.setdefault(one.latent, []).append(one)
    return found
