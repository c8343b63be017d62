"""When logits count as the same, and where LongRoPE turns."""

from __future__ import annotations

import torch
from transformers import Phi3Config

from tests.support.tiny import tiny_config
from winnow.subject.steps import same_logits, turning_points


def test_logits_are_the_same_up_to_the_noise_of_their_dtype():
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    assert same_logits(logits + 1e-4, logits)
    assert not same_logits(logits + 1e-2 * logits.flip(-1), logits)
    assert same_logits(logits.bfloat16() * 1.05, logits.bfloat16())
    one = logits.clone()
    one[2] = logits[1]
    assert not same_logits(one, logits)  # a single position
    masked = logits.clone()
    masked[:, :5] = -torch.inf
    assert same_logits(masked, masked.clone())
    assert not same_logits(logits, masked)
    assert not same_logits(torch.full_like(logits, torch.nan), logits)
    assert not same_logits(logits[:2], logits)


def test_longrope_turns_at_the_original_context():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 16.0}
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = tiny_config("phi3", original_max_position_embeddings=16, rope_parameters={**rope, **factors})
    assert isinstance(config, Phi3Config)
    assert turning_points(config) == {16}
    assert turning_points(tiny_config("llama")) == set()
    assert turning_points(tiny_config("gpt2")) == set()
