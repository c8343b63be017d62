"""Codes of a dataset, turned from rows to latents on disk; nothing grows with rows or latents in memory.

Letters: R rows of a unit, D d_model, N latents, E active entries of a unit.

A *block* is one unit's codes in a local folder of `.npy` files, written once and renamed into place:

    latent_start [N+1], row [E], value [E]    entries by (latent, row): all of latent n lies together
    row_start [R+1], latent [E]               the same entries by row
    tokens [W, T], read [R]                   the unit's tokens, and which rows have weight above 0

Rows are numbered in *planned* order (window by window), not in the order they are stored. To merge blocks
is to concatenate the pieces of one latent, so any worker can make any block.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from winnow.sae.model import Sae
from winnow.store import ActivationStore
from winnow.store.format import layout

ENCODED_NUMBERS = 1 << 26
"""Largest rows x latents that one call of `encode` may hold densely."""
READ_BYTES = 1 << 26
"""Rows read at a time, as float32 bytes."""


@dataclass(frozen=True)
class Block:
    """One unit's codes, mapped from disk; see the module's docstring for shapes."""

    latent_start: NDArray[np.int64]
    row: NDArray[np.uint32]
    value: NDArray[np.float32]
    row_start: NDArray[np.int64]
    latent: NDArray[np.uint32]
    tokens: NDArray[np.uint32]
    read: NDArray[np.bool_]

    @classmethod
    def open(cls, folder: Path) -> Block:
        """Map a block; nothing is read yet."""
        return cls(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in cls.__annotations__})


def block_folder(scratch: Path, unit: int) -> Path:
    """Where a unit's block lies."""
    return scratch / f"unit-{unit:08d}"


def make_block(dataset: ActivationStore, sae: Sae, hook: str, unit: int, scratch: Path) -> Path:
    """Encode one unit and write its block, unless it is there already.

    Args:
        dataset: Where the rows are.
        sae: What encodes them.
        hook: The hook it reads.
        unit: Which unit.
        scratch: A local folder for all blocks.

    Returns:
        The block's folder.
    """
    folder = block_folder(scratch, unit)
    if folder.exists():
        return folder
    rows = dataset.plan.rows_per_unit
    planned = layout.row_permutation(dataset.plan, unit)
    row, latent, value = _encode_unit(dataset, sae, hook, unit, planned)
    arrays: dict[str, NDArray[Any]] = transposed(row, latent, value, rows=rows, latents=sae.latents)
    read = np.empty(rows, dtype=np.bool_)
    read[planned] = dataset.weights([hook], unit * rows, (unit + 1) * rows) > 0
    arrays |= {"tokens": dataset.unit_tokens(unit), "read": read}
    scratch.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix="making-", dir=scratch))
    try:
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array, allow_pickle=False)
        temporary.rename(folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if not folder.exists():  # another worker was quicker
            raise
    return folder


def _encode_unit(
    dataset: ActivationStore, sae: Sae, hook: str, unit: int, planned: NDArray[np.int64]
) -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.float32]]:
    """Active entries of one unit: (planned row, latent, value), each [E], in any order."""
    device, size = sae.W_dec.device, dataset.plan.rows_per_unit
    chunk = max(dataset.plan.rows_per_slice, READ_BYTES // (4 * sae.d_model))
    step = max(1, ENCODED_NUMBERS // sae.latents)
    parts: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = []
    for first in range(0, size, chunk):
        stop = min(first + chunk, size)
        keep = np.flatnonzero(dataset.weights([hook], unit * size + first, unit * size + stop) > 0)
        if not len(keep):
            continue
        rows = torch.from_numpy(dataset.read_rows(hook, unit * size + first, unit * size + stop))
        rows = rows if len(keep) == len(rows) else rows[torch.from_numpy(keep)]
        for low in range(0, len(rows), step):
            with torch.no_grad():
                values, indices = sae.encode(rows[low : low + step].to(device))
            values, indices = values.float().cpu().numpy(), indices.cpu().numpy()
            at, slot = np.nonzero(values > 0)
            where = planned[first + keep[low + at]]
            parts.append((where.astype(np.uint32), indices[at, slot].astype(np.uint32), values[at, slot]))
    if not parts:
        return np.empty(0, np.uint32), np.empty(0, np.uint32), np.empty(0, np.float32)
    row, latent, value = (np.concatenate(column) for column in zip(*parts, strict=True))
    return row, latent, value


def transposed(
    row: NDArray[np.uint32],
    latent: NDArray[np.uint32],
    value: NDArray[np.float32],
    *,
    rows: int,
    latents: int,
) -> dict[str, NDArray[Any]]:
    """A block's arrays from entries in any order; (row, latent) pairs are unique. Pure.

    Args:
        row: [E], below `rows`.
        latent: [E], below `latents`.
        value: [E].
        rows: R.
        latents: N.
    """
    by_latent = _order(latent, row)
    by_row = _order(row, latent)
    return {
        "latent_start": _starts(latent, latents),
        "row": row[by_latent],
        "value": value[by_latent],
        "row_start": _starts(row, rows),
        "latent": latent[by_row],
    }


def _order(major: NDArray[np.uint32], minor: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Places of the pairs in ascending (major, minor)."""
    return np.argsort(major.astype(np.uint64) << np.uint64(32) | minor)


def _starts(of: NDArray[np.uint32], length: int) -> NDArray[np.int64]:
    starts = np.zeros(length + 1, dtype=np.int64)
    np.cumsum(np.bincount(of, minlength=length), out=starts[1:])
    return starts


def merge(
    blocks: Sequence[Block], first: int, stop: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """All entries of latents `first` to `stop - 1`, over blocks of equal size in the order given. Pure.

    Returns:
        (start [stop - first + 1], row [E], value [E]): entries of latent `first + i` are
        `start[i]:start[i + 1]`, by ascending row; rows are numbered over all blocks.
    """
    size = len(blocks[0].row_start) - 1
    latents, rows, values = [], [], []
    for number, block in enumerate(blocks):
        bounds = np.asarray(block.latent_start[first : stop + 1])
        low, high = int(bounds[0]), int(bounds[-1])
        latents.append(np.repeat(np.arange(stop - first), np.diff(bounds)))
        rows.append(np.asarray(block.row[low:high]).astype(np.int64) + number * size)
        values.append(np.asarray(block.value[low:high]))
    latent = np.concatenate(latents)
    order = np.argsort(latent, kind="stable")
    starts = np.zeros(stop - first + 1, dtype=np.int64)
    np.cumsum(np.bincount(latent, minlength=stop - first), out=starts[1:])
    return starts, np.concatenate(rows)[order], np.concatenate(values)[order]


def firing_counts(blocks: Sequence[Block]) -> NDArray[np.int64]:
    """int64 [N]: rows on which each latent is active, over all blocks."""
    return np.sum([np.diff(block.latent_start) for block in blocks], axis=0)
