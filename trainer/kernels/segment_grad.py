"""`decode_grad_weight` and `encode_grad_weight`: gradients [N, D] as sums over each latent's entries.

Equivalent to `reference.segment_grad`: `scatter(values).T @ rows`. For W_dec the values are the codes and
the rows the gradient of the reconstruction; for W_enc the values are the codes' gradient and the rows the
encoder's input.

The B*K entries are sorted by latent, stably, so that each latent's entries stay in the order of rows, and
are summed in that order: no atomics, the same bits every run.

Legend: B rows, D width, N latents, K entries per row.
"""

from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.trainer.kernels import reference
from winnow.trainer.kernels.dispatch import triton_module, unknown

# 2 MiB: an optimiser pass over whole gradients took 87 ms of thread time, block by block 35 (docs/kernels.md)
BLOCK_BYTES = 2 << 20
"""Bytes of the sums computed at a time on the CPU: small enough to stay in cache until they are used."""
GPU_BLOCK_BYTES = 1 << 28
"""The same on a GPU, where a block only bounds the memory of temporary tensors."""
CHUNK, LARGEST_CHUNK = 128, 1024
"""Fewest and most entries of a chunk, into which a GPU splits those of a hot latent."""


class Segments(NamedTuple):
    """The E entries of codes [B, K], B*K or some of them, sorted by latent."""

    order: Tensor
    """int64 [E]: the position of each sorted entry in the flattened codes."""
    row: Tensor
    """int64 [E]: its row."""
    latent: Tensor
    """int64 or int32 [E]: its latent, ascending."""
    ends: Tensor
    """int64 [N + 1]: latent n's entries are ends[n] up to ends[n + 1]."""

    def of(self, block: slice) -> Self:
        """The segments of a slice of the latents, as if there were no others; positions stay the same."""
        return self._replace(ends=self.ends[block.start : block.stop + 1])


def segments_of(indices: Tensor, latents: int, chosen: Tensor | None = None) -> Segments:
    """Sort the entries of indices int64 [B, K]; if `chosen`, bool [B, K], is given, only those."""
    flat = indices.flatten()
    places = None if chosen is None else chosen.flatten().nonzero().flatten()
    # stable, so that a latent's entries are added in the order of rows: the same bits every run
    latent, order = (flat if places is None else flat[places]).sort(stable=True)
    ends = F.pad(torch.bincount(latent, minlength=latents).cumsum(0), (1, 0))
    order = order if places is None else places[order]
    # `max`: codes without slots (K = 0) would divide by 0
    return Segments(order, order.div(max(1, indices.shape[1]), rounding_mode="floor"), latent, ends)


def segments_unasked(indices: Tensor, latents: int, chosen: Tensor | None = None) -> Segments:
    """`segments_of` without a number from the device, for which its queue would have to run dry.

    Entries that are not chosen come last, past the last end, as of a latent N that there is not.
    """
    # a radix sort goes through the keys byte by byte: 32 bits take half the passes of 64
    key = indices.flatten().to(torch.int32)
    if chosen is not None:
        key = torch.where(chosen.flatten(), key, latents)
    latent, order = key.sort(stable=True)
    edges = torch.arange(latents + 1, dtype=torch.int32, device=key.device)
    # not `bincount`, which asks the device for the largest of its input
    ends = torch.searchsorted(latent, edges)
    return Segments(order, order.div(max(1, indices.shape[1]), rounding_mode="floor"), latent, ends)


def chunk_size(entries: int, latents: int) -> int:
    """Most entries of a latent that a GPU does not split into chunks; a power of two."""
    # four times the mean, so that few are: their partial sums are written and read again. At K = 256 and
    # B = 65,536 chunks of 128 would take 0.8 GB for them
    four_times_the_mean = 4 * entries // max(1, latents)
    return min(LARGEST_CHUNK, max(CHUNK, 1 << max(0, four_times_the_mean - 1).bit_length()))


@torch.library.custom_op("winnow::segment_grad", mutates_args=())
def segment_grad(values: Tensor, indices: Tensor, rows: Tensor, latents: int, backend: str) -> Tensor:
    """Sum `rows`, weighted by each latent's values, for every latent.

    Args:
        values: [B, K].
        indices: int64 [B, K], each in [0, N).
        rows: [B, D].
        latents: N.
        backend: See `dispatch`.

    Returns:
        [N, D] of rows' type; not differentiable again.
    """
    if backend == "cpu":
        segments = segments_of(indices, latents)
        return _segment_sums_cpu(values.flatten()[segments.order], segments, rows)
    if backend == "triton":
        segments = segments_unasked(indices, latents)
        module = triton_module("segment_grad")
        return module.segment_sums(values.flatten()[segments.order], segments, rows)
    if backend == "eager":
        return reference.segment_grad(values, indices, rows, latents)
    raise unknown(backend)


@segment_grad.register_fake
def _(values: Tensor, indices: Tensor, rows: Tensor, latents: int, backend: str) -> Tensor:  # noqa: ARG001
    return rows.new_empty(latents, rows.shape[1])


decode_grad_weight = encode_grad_weight = segment_grad


def _segment_sums_cpu(values: Tensor, segments: Segments, rows: Tensor) -> Tensor:
    """Sums [N, D] from values [B*K] in the segments' order."""
    latents = len(segments.ends) - 1
    sums = rows.new_empty(latents, rows.shape[1])
    for block in latent_blocks(latents, rows):
        sums[block] = segment_block_cpu(values, segments, rows, block)
    return sums


def latent_blocks(latents: int, rows: Tensor, block_bytes: int = BLOCK_BYTES) -> list[slice]:
    """Cut the N latents into slices whose sums of rows [B, D] take `block_bytes`."""
    size = max(1, block_bytes // max(1, rows.shape[1] * rows.element_size()))
    return [slice(first, min(first + size, latents)) for first in range(0, latents, size)]


def segment_block_cpu(values: Tensor, segments: Segments, rows: Tensor, block: slice) -> Tensor:
    """Sums of a slice of the latents, each a bag of rows."""
    low, high = int(segments.ends[block.start]), int(segments.ends[block.stop])
    if low == high:
        return rows.new_zeros(block.stop - block.start, rows.shape[1])
    starts = segments.ends[block] - low
    weights = values[low:high].to(rows.dtype)
    return F.embedding_bag(segments.row[low:high], rows, starts, per_sample_weights=weights, mode="sum")
