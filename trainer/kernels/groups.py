"""Sizes of the GPU's `encode_topk`, in a file that needs no Triton.

The columns of a product are cut into groups. Of each the kernel keeps the largest number, its column and a
bound on the runner-up, 8 bytes in all; it multiplies a group again if its runner-up may be among the best.

What is held decides how often W_enc is read, once per chunk of rows:

| latents, k | columns of a group | rows of a chunk (FLOP per byte of a bfloat16 W_enc) |
|---|---|---|
| 131,072, 32 or 64 | 16 | 8,192 |
| 1,048,576, 32 or 64 | 64 | 4,096 |
| 16,777,216, 32 to 256 | 128 | 512 |
"""

SMALLEST_GROUP, LARGEST_GROUP = 2, 128
HELD_BYTES = 1 << 29
"""Bytes of groups held at a time; rows are encoded in chunks of that size."""
GROUP_BYTES = 8
ROWS = 128
"""Rows of a product's block, and the least of a chunk."""
COLUMNS = 128
"""Columns of a product's block, a multiple of LARGEST_GROUP."""
LARGEST_K = 1024
"""Entries per row that one program orders."""
SLACK = 1.02
"""Of a bound: its norms are rounded, and |x'| |w'| is up to (1 + 2^-8)^2 times |x| |w|."""


def group_size(latents: int, k: int) -> int:
    """Columns of a group, a power of two.

    The smaller a group, the more numbers there are to write and choose from; the larger, the more groups hold
    two of a row's best.
    """
    # Reckoned in products, at an H100's rates and D = 768: 1.8 / G to write and read the groups, and
    # 135 (k G / N)^2 to multiply groups again if active latents are spread evenly. With clusters these are
    # more: the sum is least, if they are four times as many, where 600 G^3 k^2 = N^2
    size = SMALLEST_GROUP
    while size < LARGEST_GROUP and 600 * (2 * size) ** 3 * k**2 <= latents**2:
        size *= 2
    return size


def groups_of(latents: int, group: int) -> int:
    """Groups per row, including those of the last block's columns past the end."""
    return -(-latents // COLUMNS) * (COLUMNS // group)


def chunk_rows(latents: int, group: int) -> int:
    """Rows encoded at a time, so that their groups take HELD_BYTES."""
    return max(ROWS, HELD_BYTES // (GROUP_BYTES * groups_of(latents, group)) // ROWS * ROWS)


def slack_of(width: int) -> float:
    """What sums of D products may be apart, in float32 and on tensor cores: a share of |x| |w| + |b|."""
    # (D + 1) u in float32, 3 D u on tensor cores and 16 u for the bound itself (`encode_bounded_triton`)
    return (4 * width + 16) * 2.0**-24 * SLACK


def slots_of(k: int) -> int:
    """Groups selected per row by their bounds: the k best, and room for those that may reach them."""
    slots = 64
    while slots < k + k // 4 + 8:
        slots *= 2
    return slots
