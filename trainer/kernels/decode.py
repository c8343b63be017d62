"""`decode(values, indices, W_dec)`: codes to rows, as a weighted gather.

Equivalent to `reference.decode`: `scatter(values) @ W_dec`.

Legend: B rows, D width, N latents, K entries per row.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.trainer.kernels import reference
from winnow.trainer.kernels.decode_grad_values import decode_grad_values
from winnow.trainer.kernels.dispatch import triton_module, unknown
from winnow.trainer.kernels.segment_grad import decode_grad_weight


@torch.library.custom_op("winnow::decode", mutates_args=())
def decode(values: Tensor, indices: Tensor, W_dec: Tensor, backend: str) -> Tensor:
    """Turn codes into rows.

    Args:
        values: [B, K].
        indices: int64 [B, K], each in [0, N).
        W_dec: [N, D].
        backend: See `dispatch`.

    Returns:
        [B, D] of W_dec's type.
    """
    if backend == "cpu":
        return decode_cpu(values, indices, W_dec)
    if backend == "triton":
        return triton_module("decode").decode(values, indices, W_dec)
    if backend == "eager":
        return reference.decode(values, indices, W_dec)
    raise unknown(backend)


@decode.register_fake
def _(values: Tensor, indices: Tensor, W_dec: Tensor, backend: str) -> Tensor:  # noqa: ARG001
    return W_dec.new_empty(values.shape[0], W_dec.shape[1])


def _setup(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG001
    values, indices, W_dec, ctx.backend = inputs
    ctx.save_for_backward(values, indices, W_dec)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, indices, W_dec = ctx.saved_tensors
    wants_values, _, wants_W, _ = ctx.needs_input_grad
    # the dots come in the accumulator's type, which for half precision is not the values'
    dv = decode_grad_values(grad, indices, W_dec, ctx.backend).to(values.dtype) if wants_values else None
    dW = decode_grad_weight(values, indices, grad, len(W_dec), ctx.backend) if wants_W else None
    return dv, None, dW, None


decode.register_autograd(_backward, setup_context=_setup)


def decode_cpu(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """`decode` by torch's weighted embedding bag, which sums each row's K entries in order."""
    # with K = 0 torch 2.13's `embedding_bag` fails ("step must be nonzero")
    if not indices.numel():
        return W_dec.new_zeros(len(values), W_dec.shape[1])
    weights = values.to(W_dec.dtype)
    return F.embedding_bag(indices, W_dec, per_sample_weights=weights, mode="sum")
