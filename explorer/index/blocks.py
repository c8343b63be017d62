"""Codes of a dataset, transposed on disk from rows to latents in bounded memory.

Letters: R rows of a unit, D d_model, N latents, E active entries of a unit.

A *block* is one unit's codes in a local folder of `.npy` files, written once and renamed into place:

    latent_start [N+1], row [E], value [E]    entries by (latent, row): those of a latent are contiguous
                                              of a crosscoder value is [E, 1 + H] (`parts`)
    row_start [R+1], latent [E]               the same entries by row
    tokens [W, T], read [R]                   the unit's tokens, and which rows have weight above 0

Rows are numbered in *planned* order (window by window), not in the order they are stored. Blocks are merged
by concatenating the pieces of a latent, so any worker can make any block.
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

from winnow.explorer.index.parts import contributions
from winnow.sae.model import Sae
from winnow.store import ActivationStore
from winnow.store.format import layout

# 2^26 float32 are 268 MB: the largest temporary of the map step, whatever N is (docs/explorer.md, "Memory").
_ENCODED_NUMBERS = 1 << 26
"""Largest rows x latents that one call of `encode` may hold densely."""
READ_BYTES = 1 << 26
"""Bytes of rows read at a time, as float32."""


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
        """Map a block into memory; nothing is read yet."""
        # Mapped, not loaded: the reduce step opens the blocks of all units at once, 12 bytes per entry.
        return cls(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in cls.__annotations__})


def block_folder(scratch: Path, unit: int) -> Path:
    """The folder of a unit's block."""
    return scratch / f"unit-{unit:08d}"


def make_block(dataset: ActivationStore, sae: Sae, hooks: Sequence[str], unit: int, scratch: Path) -> Path:
    """Encode one unit and write its block, unless it exists.

    Args:
        dataset: Holds the rows.
        sae: Encodes them.
        hooks: The hooks that the SAE reads, and others whose sinks are left out too.
        unit: Number of the unit.
        scratch: Folder of all blocks.

    Returns:
        The block's folder.
    """
    folder = block_folder(scratch, unit)
    if folder.exists():
        return folder
    rows = dataset.plan.rows_per_unit
    # Stored rows are shuffled within the unit; examples need them beside the tokens of their window.
    planned = layout.row_permutation(dataset.plan, unit)
    row, latent, value = _encode_unit(dataset, sae, hooks, unit, planned)
    arrays: dict[str, NDArray[Any]] = transposed(row, latent, value, rows=rows, latents=sae.latents)
    read = np.empty(rows, dtype=np.bool_)
    read[planned] = dataset.weights(hooks, unit * rows, (unit + 1) * rows) > 0
    arrays |= {"tokens": dataset.unit_tokens(unit), "read": read}
    scratch.mkdir(parents=True, exist_ok=True)
    # Whole or absent: a resumed run takes every folder of the final name for finished. The temporary folder
    # is in `scratch` itself, since a rename across file systems is not atomic.
    temporary = Path(tempfile.mkdtemp(prefix="making-", dir=scratch))
    try:
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array, allow_pickle=False)
        temporary.rename(folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        # Another worker made the same unit meanwhile: both write the same bytes, so the first one stands.
        if not folder.exists():
            raise
    return folder


def _encode_unit(
    dataset: ActivationStore, sae: Sae, hooks: Sequence[str], unit: int, planned: NDArray[np.int64]
) -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.float32]]:
    """Active entries of one unit: (planned row, latent, value), each [E], in any order.

    Of a crosscoder the values are [E, 1 + H]: the activation, and what each part contributes to it.
    """
    reads = hooks[: len(sae.parts.widths) or 1]
    device, size = sae.W_dec.device, dataset.plan.rows_per_unit
    # At least a slice per read: a slice is what the store fetches and verifies.
    chunk = max(dataset.plan.rows_per_slice, READ_BYTES // (4 * sae.d_model))
    step = max(1, _ENCODED_NUMBERS // sae.latents)
    parts: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = []
    for first in range(0, size, chunk):
        stop = min(first + chunk, size)
        # Weight 0 marks sinks: the SAE was not trained on them, so they count in no density.
        keep = np.flatnonzero(dataset.weights(hooks, unit * size + first, unit * size + stop) > 0)
        if not len(keep):
            continue
        read = [dataset.read_rows(hook, unit * size + first, unit * size + stop) for hook in reads]
        rows = torch.from_numpy(read[0] if len(read) == 1 else np.concatenate(read, axis=1))
        rows = rows if len(keep) == len(rows) else rows[torch.from_numpy(keep)]
        for low in range(0, len(rows), step):
            x = rows[low : low + step].to(device)
            with torch.no_grad():
                found, slots = sae.encode(x)
                shares = contributions(sae, x, slots).float().cpu().numpy() if sae.parts.widths else None
            values, indices = found.float().cpu().numpy(), slots.cpu().numpy()
            # A slot of value 0 is padding, and its index means nothing.
            at, slot = np.nonzero(values > 0)
            if shares is not None:
                values = np.concatenate([values[..., None], shares], axis=2)
            where = planned[first + keep[low + at]]
            parts.append((where.astype(np.uint32), indices[at, slot].astype(np.uint32), values[at, slot]))
    if not parts:
        wide = (1 + len(sae.parts.widths),) if sae.parts.widths else ()
        return np.empty(0, np.uint32), np.empty(0, np.uint32), np.empty((0, *wide), np.float32)
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
        value: [E], or [E, 1 + H].
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
    """Positions of the pairs in ascending (major, minor)."""
    # One sort of one 64-bit key, since both numbers are below 2^32; the pairs are unique, so that the order
    # is the same on every machine although this sort is not stable.
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
        (start [stop - first + 1], row [E], value [E] or [E, 1 + H]): entries of latent `first + i` are
        `start[i]:start[i + 1]`, by ascending row; rows are numbered over all blocks.
    """
    size = len(blocks[0].row_start) - 1
    latents, rows, values = [], [], []
    for number, block in enumerate(blocks):
        # Slices of mapped files: only the pages of this part become resident.
        bounds = np.asarray(block.latent_start[first : stop + 1])
        low, high = int(bounds[0]), int(bounds[-1])
        latents.append(np.repeat(np.arange(stop - first), np.diff(bounds)))
        rows.append(np.asarray(block.row[low:high]).astype(np.int64) + number * size)
        values.append(np.asarray(block.value[low:high]))
    latent = np.concatenate(latents)
    # Stable: blocks are in ascending order of rows and each is sorted by row, so rows stay ascending.
    order = np.argsort(latent, kind="stable")
    starts = np.zeros(stop - first + 1, dtype=np.int64)
    np.cumsum(np.bincount(latent, minlength=stop - first), out=starts[1:])
    return starts, np.concatenate(rows)[order], np.concatenate(values)[order]


def firing_counts(blocks: Sequence[Block]) -> NDArray[np.int64]:
    """Rows on which each latent is active, over all blocks, int64 [N]."""
    return np.sum([np.diff(block.latent_start) for block in blocks], axis=0)
