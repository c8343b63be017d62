"""Sizes of the GPU's `encode_topk`."""

from __future__ import annotations

import pytest

from winnow.trainer.kernels.groups import (
    COLUMNS,
    GROUP_BYTES,
    HELD_BYTES,
    LARGEST_GROUP,
    ROWS,
    chunk_rows,
    group_size,
    groups_of,
)


@pytest.mark.parametrize(
    ("latents", "k", "group", "rows"),
    [
        (131_072, 32, 16, 8192),
        (131_072, 256, 4, 2048),
        (1 << 20, 32, 64, 4096),
        (1 << 24, 256, 128, 512),
        (300, 5, 2, 349_440),
    ],
)
def test_rows_of_a_chunk(latents, k, group, rows):
    assert group_size(latents, k) == group
    assert chunk_rows(latents, group) == rows
    assert rows * groups_of(latents, group) * GROUP_BYTES <= HELD_BYTES


def test_groups_grow_with_the_latents_per_active_one():
    sizes = [group_size(1 << bits, 32) for bits in range(5, 26)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 2
    assert sizes[-1] == LARGEST_GROUP
    # whole groups in a block, whole blocks in a row
    assert all(COLUMNS % size == 0 for size in sizes)
    assert groups_of(COLUMNS + 1, 16) == 2 * COLUMNS // 16


def test_a_chunk_is_at_least_a_block_of_rows():
    assert chunk_rows(1 << 28, 2) == ROWS
