"""`decode_grad_values(grad, indices, W_dec)`: the gradient of `decode`'s values, as gathered dots.

Equivalent to `reference.decode_grad_values`: `(grad @ W_dec.T).gather(indices)`.

Legend: B rows, D width, N latents, K entries per row.
"""

import torch
from torch import Tensor

from winnow.trainer.kernels import reference
from winnow.trainer.kernels.dispatch import triton_module, unknown
from winnow.trainer.kernels.reference import accumulator
from winnow.trainer.kernels.segment_grad import Segments, segments_of


@torch.library.custom_op("winnow::decode_grad_values", mutates_args=())
def decode_grad_values(grad: Tensor, indices: Tensor, W_dec: Tensor, backend: str) -> Tensor:
    """Compute the dots of each row with its latents' directions.

    Args:
        grad: [B, D].
        indices: int64 [B, K], each in [0, N).
        W_dec: [N, D], of grad's type.
        backend: See `dispatch`.

    Returns:
        [B, K] in the accumulator's type; not differentiable again.
    """
    if backend == "cpu":
        segments = segments_of(indices, len(W_dec))
        dots = decode_grad_values_cpu(grad, segments, W_dec)
        return torch.empty_like(dots).index_copy_(0, segments.order, dots).view(indices.shape)
    if backend == "triton":
        return triton_module("decode_grad_values").decode_grad_values(grad, indices, W_dec)
    if backend == "eager":
        return reference.decode_grad_values(grad, indices, W_dec)
    raise unknown(backend)


@decode_grad_values.register_fake
def _(grad: Tensor, indices: Tensor, W_dec: Tensor, backend: str) -> Tensor:  # noqa: ARG001
    return grad.new_empty(indices.shape, dtype=accumulator(W_dec.dtype))


def decode_grad_values_cpu(grad: Tensor, segments: Segments, W_dec: Tensor) -> Tensor:
    """Compute the dots [B*K] in the order of `segments`."""
    kind = accumulator(W_dec.dtype)
    if not segments.order.numel():
        return grad.new_empty(0, dtype=kind)
    # latent by latent: each direction is read once, and the gathered operand is the batch, which fits in
    # cache, not the decoder: 16 to 25 ms against 48 to 58 row by row (docs/kernels.md).
    # The primitive is torch's gradient of `embedding_bag` by its per_sample_weights, which no public function
    # offers; here latents are bags of rows
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        W_dec.to(kind), grad.to(kind), segments.row, segments.ends[:-1], segments.latent, 0
    )
