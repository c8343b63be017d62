"""When logits count as the same, and where LongRoPE turns."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaForCausalLM, Phi3Config
from transformers.utils.generic import ModelOutput

from tests.support.tiny import tiny_config
from winnow.subject.steps import Steps, cache_argument, same_logits, turning_points


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


def test_a_cache_has_the_name_that_the_model_gives_it():
    """`cache` from transformers 5.24 on, which warns of the old name, `past_key_values`."""
    config: Any = tiny_config("llama")
    named = cache_argument(LlamaForCausalLM(config))
    given: list[Any] = []

    class Renamed(LlamaForCausalLM):
        def forward(self, input_ids: Any, position_ids: Any = None, cache: Any = None, **rest: Any) -> Any:  # pyright: ignore
            given.append(cache)
            inner: dict[str, Any] = {named: cache, "position_ids": position_ids, **rest}
            output = super().forward(input_ids, **inner)
            return ModelOutput(logits=output.logits, cache=output.get(named))

    model = Renamed(config).eval().requires_grad_(False)
    steps, ids = Steps(model, "model.layers"), torch.arange(20, 30)[None]
    whole = model(ids, use_cache=False).logits[0]
    logits, kept = steps.run(ids[:, :-1], 9, None)
    assert same_logits(logits, whole[-2])
    assert kept is not None
    assert [*kept] == ["cache"]
    assert same_logits(steps.run(ids[:, -1:], 10, kept)[0], whole[-1])
    assert given[-1] is given[-2] is not None


def test_a_cache_is_given_back_by_the_name_that_the_pass_takes():
    """Code that comes with weights says `past_key_values`; transformers 5.24 returns `cache` all the same."""
    config: Any = tiny_config("llama")
    named = cache_argument(LlamaForCausalLM(config))

    class Older(LlamaForCausalLM):
        def forward(  # pyright: ignore
            self,
            input_ids: Any,
            position_ids: Any = None,
            past_key_values: Any = None,
            use_cache: bool = True,
        ) -> Any:
            inner: dict[str, Any] = {named: past_key_values, "position_ids": position_ids}
            output = super().forward(input_ids, use_cache=use_cache, **inner)
            return ModelOutput(logits=output.logits, cache=output.get(named))

    model = Older(config).eval().requires_grad_(False)
    steps, ids = Steps(model, "model.layers"), torch.arange(20, 30)[None]
    whole = model(ids, use_cache=False).logits[0]
    _, kept = steps.run(ids[:, :-1], 9, None)
    assert kept is not None, "every token would take a whole pass"
    assert [*kept] == ["past_key_values"]
    assert same_logits(steps.run(ids[:, -1:], 10, kept)[0], whole[-1])
