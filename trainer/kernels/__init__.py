"""The sparse operations of a training step, whose only dense product is the encoder's.

One operation per file, each with a CPU path (torch alone) and a Triton path (`*_triton.py`, imported only
if it is chosen); `dispatch` chooses between them by name, `reference` holds the dense equivalents that
tests and benchmarks compare with. docs/kernels.md has their measured times.
"""

from winnow.trainer.kernels.decode import decode
from winnow.trainer.kernels.decode_grad_values import decode_grad_values
from winnow.trainer.kernels.dispatch import Backend, choose
from winnow.trainer.kernels.encode_topk import encode_topk
from winnow.trainer.kernels.segment_grad import decode_grad_weight, encode_grad_weight

__all__ = [
    "Backend",
    "choose",
    "decode",
    "decode_grad_values",
    "decode_grad_weight",
    "encode_grad_weight",
    "encode_topk",
]
