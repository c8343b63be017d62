"""The dataset as a zarr v3 group: metadata only, for other readers; Winnow's own never need it."""

# zarr's signatures name numcodecs, which has no type stubs.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import json
import math
import warnings
from typing import Any, cast

import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from winnow.schemas.harvest import HarvestPlan
from winnow.store.format.labels import LABELS
from winnow.store.format.layout import (
    BFLOAT16_NAN,
    INT8_NAN,
    LABEL_DIGESTS_ARRAY,
    LABELS_GROUP,
    STORED_DTYPES,
    TOKEN_DIGESTS_ARRAY,
    TOKENS_ARRAY,
    array_key,
)
from winnow.store.format.shards import ZSTD_LEVEL

TOKEN_DIGESTS_KEY = f"{TOKEN_DIGESTS_ARRAY}/c/0/0"
"""The one chunk of the token digests."""
LABEL_DIGESTS_KEY = f"{LABEL_DIGESTS_ARRAY}/c/0/0/0"
"""The one chunk of the label digests."""


def zarr_objects(plan: HarvestPlan) -> dict[str, bytes]:
    """Let zarr-python make every `zarr.json`, key -> JSON; the root's contains them all (consolidated)."""
    objects: dict[str, Buffer] = {}
    memory = MemoryStore(objects)
    about = {"plan": "plan.json", "plan_fingerprint": plan.fingerprint, "subject": plan.subject.model}
    root = zarr.open_group(memory, mode="w-", zarr_format=3, attributes={"winnow": about})
    # The crc32c is of each inner chunk: without it, zarr reads a flipped bit as data (seen with zarr 3.1).
    common: dict[str, Any] = {"compressors": (Crc32cCodec(),), "filters": None}
    little = BytesCodec(endian="little")
    packing = (ZstdCodec(level=ZSTD_LEVEL),) if plan.spec.compress == "zstd" else ()
    root.create_array(
        TOKENS_ARRAY,
        shape=(plan.windows, plan.spec.context_length),
        chunks=(plan.spec.windows_per_unit, plan.spec.context_length),
        dtype="uint32",
        serializer=little,
        fill_value=0,
        dimension_names=("window", "position"),
        attributes={"order": "planned"},
        **common,
    )
    root.create_array(
        TOKEN_DIGESTS_ARRAY,
        shape=(plan.units, 32),
        chunks=(plan.units, 32),
        dtype="uint8",
        fill_value=0,
        dimension_names=("unit", "byte"),
        attributes={"digest": "sha256 of each unit's tokens, uint32 little-endian"},
        **common,
    )
    if plan.labels is not None:
        _label_arrays(root, plan, common)
    absent = {"bfloat16": BFLOAT16_NAN, "int8": INT8_NAN}.get(plan.spec.dtype, math.nan)
    scales = {"scale": "float32, little-endian, in the last 4 bytes of each row"}
    for site in plan.sites:
        width = plan.stored_width(site.name)
        root.create_array(
            array_key(site.name),
            shape=(plan.rows, width),
            chunks=(plan.rows_per_slice, width),
            shards=(plan.rows_per_unit, width),
            compressors=packing + common["compressors"],
            dtype=STORED_DTYPES[plan.spec.dtype],
            serializer=little,
            fill_value=absent,
            # A name per hook: xarray refuses a group in which one dimension has two lengths.
            dimension_names=("row", f"dimension.{site.name}"),
            attributes={
                "hook": site.name,
                "logical_dtype": plan.spec.dtype,
                "rows_per_unit": plan.rows_per_unit,
                "sinks": "marked in receipts",
                **(scales if plan.spec.dtype == "int8" else {}),
            },
            filters=None,
        )
    # With consolidated metadata a reader lists nothing; zarr warns that version 3 does not specify it yet.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        zarr.consolidate_metadata(memory)
    return {key: value.to_bytes() for key, value in objects.items()}


def _label_arrays(root: zarr.Group, plan: HarvestPlan, common: dict[str, Any]) -> None:
    roles = list(plan.labels.roles) if plan.labels is not None else []
    for name, dtype in LABELS.items():
        root.create_array(
            f"{LABELS_GROUP}/{name}",
            shape=(plan.windows, plan.spec.context_length),
            chunks=(plan.spec.windows_per_unit, plan.spec.context_length),
            dtype=dtype,
            serializer=BytesCodec(endian="little" if dtype.itemsize > 1 else None),
            fill_value=0,
            dimension_names=("window", "position"),
            attributes={"order": "planned", **({"names": roles} if name == "role" else {})},
            **common,
        )
    root.create_array(
        LABEL_DIGESTS_ARRAY,
        shape=(plan.units, len(LABELS), 32),
        chunks=(plan.units, len(LABELS), 32),
        dtype="uint8",
        fill_value=0,
        dimension_names=("unit", "label", "byte"),
        attributes={"digest": "sha256 of each unit's labels, little-endian", "labels": list(LABELS)},
        **common,
    )


def same_array(found: bytes, expected: bytes) -> bool:
    """Return whether two `zarr.json` describe the same stored bytes."""
    # By these fields and not byte for byte: zarr releases word the rest differently, and dimensions had other
    # names in 0.1.
    try:
        theirs: Any = json.loads(found)
        ours: dict[str, Any] = json.loads(expected)
    except ValueError:
        return False
    fields = ("zarr_format", "node_type", "shape", "data_type", "chunk_grid", "codecs", "fill_value")
    if not isinstance(theirs, dict):
        return False
    given = cast(dict[str, Any], theirs)
    return all(given.get(name) == ours.get(name) for name in fields)
