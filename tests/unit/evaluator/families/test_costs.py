"""Cross-entropy and KL of logits against their dense definitions."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from winnow.evaluator.families.downstream import costs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_costs_are_the_dense_ones(dtype):
    draw = torch.Generator().manual_seed(0)
    clean, logits = ((4 * torch.randn(3, 9, 50, generator=draw) + shift).to(dtype) for shift in (0.0, 7.0))
    ids = torch.randint(0, 50, (3, 9), generator=draw)
    loss, kl = costs(logits, ids, clean)
    p, q = (each[:, :-1].double().log_softmax(-1) for each in (clean, logits))
    dense = cross_entropy(logits[:, :-1].double().transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
    torch.testing.assert_close(loss.double(), dense, rtol=1e-5, atol=1e-5)
    assert kl is not None
    torch.testing.assert_close(kl.double(), (p.exp() * (p - q)).sum(-1).mean(1), rtol=1e-5, atol=1e-5)
    assert costs(logits, ids)[1] is None
    same = costs(clean, ids, clean)[1]
    assert same is not None
    torch.testing.assert_close(same, torch.zeros(3), rtol=0, atol=1e-6)
