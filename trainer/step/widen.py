"""Rows as they are stored, widened to float32 where they are used: on a GPU they travel in fewer bytes.

Legend: B rows, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.schemas.harvest import SCALE_BYTES


def widened(rows: Tensor) -> Tensor:
    """Rows in float32; the same bits as the store's own widening (`winnow.store.read.torch_stream.widen`).

    Args:
        rows: [B, D] of a floating type, or int8 [B, D + 4] whose last four bytes are the row's scale, a
            float32. Types as wide as float32 are returned as they are.
    """
    if rows.dtype == torch.int8:
        # a copy of the scales, since only aligned bytes can be viewed as float32
        scale = rows[:, -SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float32)
        return rows[:, :-SCALE_BYTES] * scale
    return rows.float() if rows.element_size() < 4 else rows
