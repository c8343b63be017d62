"""Receipts gathered in Parquet: what `manifest.json` names.

One row a unit, in unit order. Typed columns serve queries by any Parquet reader; the receipt itself
is one column of JSON, so that there is one schema of receipts, the pydantic one.

=============== ========================================================================
unit            int64
revision        int32
void            string, null for a unit that holds data
tokens_sha256   string
content_sha256  string, digest of `UnitReceipt.content()`
bytes           int64, all shards of the unit
sinks           int64, marked rows over all hooks
receipt         string, the receipt as canonical JSON
=============== ========================================================================
"""

# pyarrow has no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.base import sha256_hex
from schemas.errors import IntegrityError
from schemas.harvest import HarvestPlan, ManifestPart, UnitReceipt
from store.commit import parse_receipt
from store.layout import MANIFEST_DIR
from store.objects import ObjectStore

PART_UNITS = 10_000
"""Units in one part; the last has fewer."""
PART_GROUP = 1000
"""Units in one row group of a part."""
MAX_GROUP_BYTES = 1 << 29
"""Largest row group that is unpacked, in bytes."""
MAX_FOOTER_BYTES = 1 << 24
"""Longest string, and most entries of a list, in a part's footer."""

_SCHEMA: Any = pa.schema(
    [
        pa.field("unit", pa.int64(), nullable=False),
        pa.field("revision", pa.int32(), nullable=False),
        pa.field("void", pa.string()),
        pa.field("tokens_sha256", pa.string(), nullable=False),
        pa.field("content_sha256", pa.string(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("sinks", pa.int64(), nullable=False),
        pa.field("receipt", pa.string(), nullable=False),
    ]
)


def part_key(sha256: str) -> str:
    """Key of the part whose bytes have this digest."""
    return f"{MANIFEST_DIR}/units-{sha256}.parquet"


def encode_part(receipts: Sequence[UnitReceipt]) -> tuple[bytes, ManifestPart]:
    """Receipts of consecutive units as Parquet bytes, and the manifest's entry for them.

    Equal receipts give equal bytes with the same pyarrow release.
    """
    columns: list[list[Any]] = [
        [r.unit for r in receipts],
        [r.revision for r in receipts],
        [r.void for r in receipts],
        [r.tokens_sha256 for r in receipts],
        [sha256_hex(r.content()) for r in receipts],
        [sum(shard.bytes for shard in r.shards.values()) for r in receipts],
        [sum(len(shard.sinks) for shard in r.shards.values()) for r in receipts],
        [r.canonical().decode() for r in receipts],
    ]
    arrays = [pa.array(values, field.type) for values, field in zip(columns, _SCHEMA, strict=True)]
    sink = io.BytesIO()
    pq.write_table(
        pa.Table.from_arrays(arrays, schema=_SCHEMA),
        sink,
        row_group_size=PART_GROUP,
        compression="zstd",
        compression_level=3,
        version="2.6",
        data_page_version="1.0",
        use_dictionary=False,
        write_statistics=True,
    )
    body = sink.getvalue()
    digest = sha256_hex(body)
    part = ManifestPart(
        key=part_key(digest),
        bytes=len(body),
        sha256=digest,
        first_unit=receipts[0].unit,
        units=len(receipts),
    )
    return body, part


def read_part(store: ObjectStore, plan: HarvestPlan, part: ManifestPart) -> Iterator[UnitReceipt]:
    """The receipts of one part, in unit order, each checked against the plan; a thousand at a time.

    The part's own digest is checked; `content_sha256` is left to `verify`.

    Raises:
        MissingObject: The part is not there.
        IntegrityError: Its bytes, columns or receipts are not what the manifest and the plan promise.
    """
    origin = f"{store.uri}/{part.key}"
    body = store.get(part.key, part.bytes)
    if len(body) != part.bytes or sha256_hex(body) != part.sha256:
        raise IntegrityError(f"{origin} is damaged", expected=f"{part.bytes} bytes of sha256 {part.sha256}")
    try:
        file = pq.ParquetFile(
            io.BytesIO(body),
            thrift_string_size_limit=MAX_FOOTER_BYTES,
            thrift_container_size_limit=MAX_FOOTER_BYTES,
        )
        if not file.schema_arrow.equals(_SCHEMA):
            raise IntegrityError(f"{origin} has other columns", expected=_SCHEMA.names)
        if file.metadata.num_rows != part.units:
            raise IntegrityError(f"{origin} is incomplete", expected=f"{part.units} units")
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        if any(group.total_byte_size > MAX_GROUP_BYTES for group in groups):
            raise IntegrityError(f"{origin} unpacks to too much", expected=f"{MAX_GROUP_BYTES} bytes a group")
        if any(group.num_rows > PART_GROUP for group in groups):
            raise IntegrityError(
                f"{origin} has too large a row group", expected=f"{PART_GROUP} units at most"
            )
        unit = part.first_unit
        for batch in file.iter_batches(batch_size=PART_GROUP, columns=["revision", "receipt"]):
            for revision, text in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                where = f"{origin}, receipt of unit {unit}"
                yield parse_receipt(text.encode(), plan, unit, revision, origin=where)
                unit += 1
    except pa.ArrowException as error:
        raise IntegrityError(f"{origin} is not readable Parquet", got=str(error)[:200]) from error


class DatasetDigest:
    """`HarvestManifest.dataset_sha256`, built by feeding every unit's receipt in unit order."""

    def __init__(self, plan: HarvestPlan) -> None:
        self._hash = hashlib.sha256(b"winnow.dataset.v1\n" + plan.fingerprint.encode() + b"\n")

    def add(self, receipt: UnitReceipt) -> None:
        """Take in the next unit."""
        self._hash.update(sha256_hex(receipt.content()).encode() + b"\n")

    def hexdigest(self) -> str:
        """The digest over all units fed so far."""
        return self._hash.hexdigest()


def dataset_digest(plan: HarvestPlan, receipts: Iterable[UnitReceipt]) -> str:
    """`HarvestManifest.dataset_sha256` of these receipts, one for each unit in unit order."""
    digest = DatasetDigest(plan)
    for receipt in receipts:
        digest.add(receipt)
    return digest.hexdigest()
