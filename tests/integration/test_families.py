"""Architectures that are not keys and values all the way: identity, tail and generation equal whole passes.

Windows, chunks and top-k are made small, and sequences longer than them.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.evaluated import D_MODEL, HOOK, random_sae, save_sae, toy_config
from tests.support.explorer_site import SPEC
from tests.support.tiny import make_subject
from winnow.evaluator.families import ablation, downstream
from winnow.evaluator.prompt import attribute_prompt
from winnow.evaluator.setting import Setting
from winnow.explorer.index.make import make_index
from winnow.explorer.place import Place
from winnow.sae import Sae
from winnow.schemas.evaluation import EvaluateSpec
from winnow.subject import Subject
from winnow.subject.generate import Steer
from winnow.subject.steps import same_logits
from winnow.subject.tail import Tail

MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", {"state_size": 8}),
    "rwkv": ("rwkv", {}),
    "recurrent_gemma": ("recurrent_gemma", {"attention_window_size": 16, "head_dim": 8, "lru_width": 32}),
    "jamba": (
        "jamba",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 8},
    ),
    "bamba": (
        "bamba",
        {
            "attn_layer_indices": [1, 3],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
        },
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}),
    "minimax": ("minimax", {"head_dim": 8, "num_local_experts": 4, "block_size": 16}),
    "zaya": (
        "zaya",
        {
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "router_hidden_size": 8,
        },
    ),
    "indexer": (
        "deepseek_v32",
        {**MLA, **EXPERTS, "topk_group": 1, "num_key_value_heads": 4, "index_topk": 16, "index_head_dim": 8},
    ),
    "gemma4, shared keys": (
        "gemma4_text",
        {
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 16,
            "head_dim": 8,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 384,
        },
    ),
    "phi3, longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 16,
            "rope_parameters": {**ROPE, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
        },
    ),
    "moshi": ("moshi", {"sliding_window": 16, "head_dim": 8, "ffn_dim": 64}),
    "gemma2, past its window": ("gemma2", {"sliding_window": 16}),
}
TOKENS = np.random.default_rng(0).integers(16, 256, (3, 26))


@pytest.fixture(scope="module")
def subject_of(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Subject] = {}

    def load(family: str) -> Subject:
        if family not in made:
            architecture, fields = FAMILIES[family]
            folder = make_subject(tmp_path_factory.mktemp("subject"), architecture, **fields)
            made[family] = Subject.load({"model": str(folder), "device": "cpu", "attention": "eager"})
        return made[family]

    return load


def sae() -> Sae:
    torch.manual_seed(1)
    sae = Sae(32, 64, 8).requires_grad_(False)
    sae.W_enc.normal_()
    sae.W_dec.copy_(torch.nn.functional.normalize(sae.W_enc, dim=1))
    return sae


def noisy(x: torch.Tensor) -> torch.Tensor:
    return x * 0.7 + 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_an_identity_changes_no_bit(subject_of, family):
    subject = subject_of(family)
    clean = subject.logits(TOKENS)
    for layer in range(subject.layout.layers):
        for hook in (f"resid_pre.{layer}", f"resid_post.{layer}"):
            assert torch.equal(subject.logits(TOKENS, {hook: torch.clone}), clean)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tail_equals_the_whole_pass(subject_of, family):
    subject = subject_of(family)
    clean = subject.logits(TOKENS)
    for hook in ("resid_post.1", "resid_pre.2", "resid_post.3"):
        tail = Tail(subject, hook)
        start = tail.start(TOKENS, keep_cache=True)
        assert same_logits(start.logits, clean)
        assert same_logits(tail.patched(start, torch.clone), clean)
        assert same_logits(tail.patched(start, noisy), subject.logits(TOKENS, {hook: noisy}))
        for window, first, stop in ((1, 19, 24), (2, 9, 14)):
            row = start.rows[window, first]
            rows = torch.stack([row, noisy(row)])
            found = tail.continued(start, window, first, stop, rows)
            whole = torch.stack([whole_pass(subject, hook, window, first, variant) for variant in rows])
            assert same_logits(found, whole[:, first:stop])


def whole_pass(subject: Subject, hook: str, window: int, first: int, row: torch.Tensor) -> torch.Tensor:
    def swap(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[first] = row
        return x

    return subject.logits(TOKENS[window : window + 1], {hook: swap})[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_a_whole_pass_at_every_step(subject_of, family):
    subject, prompt = subject_of(family), TOKENS[0, :6].tolist()
    tokens = list(subject.generate(prompt, max_new_tokens=24, seed=3))
    ids = prompt + [token.id for token in tokens]
    for number, token in enumerate(tokens):
        assert same_logits(token.logits, subject.logits([ids[: 6 + number]])[0, -1]), number
    nothing = {"resid_post.1": [Steer(sae(), 7, "add", 0.0)]}
    same = list(subject.generate(prompt, max_new_tokens=24, seed=3, steer=nothing))
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(tokens, same, strict=True))


def test_what_is_spared_and_what_is_whole(subject_of, caplog):
    assert Tail(subject_of("zaya"), "resid_post.1").spared == 0.5
    with caplog.at_level(logging.WARNING):
        assert Tail(subject_of("gemma4, shared keys"), "resid_post.1").spared == 0
    assert "every pass of resid_post.1 is a whole one" in caplog.text


@pytest.mark.parametrize("architecture", ["mamba", "jamba"])
def test_figures_effects_and_index_of_a_subject_with_states(tmp_path, architecture):
    fields = {"num_experts": 2} if architecture == "jamba" else {}
    make_subject(tmp_path / "subject", architecture, layers=3, width=D_MODEL, **fields)
    config = toy_config(tmp_path, units=1, subject={"attention": "eager"}, plan={"hooks": [HOOK]})
    uri = save_sae(config, tmp_path / "sae", random_sae())
    spec = EvaluateSpec(windows=4, ablation_tokens=4, ablation_rows=2, ablation_latents=2)
    setting = Setting.open(uri, config.root, spec)
    figures = {figure.id: figure.value for figure in downstream.measure(setting).figures}
    own = setting.subject.loss(setting.tokens(setting.windows)).mean().item()
    assert figures["ce_clean"] == pytest.approx(own, rel=1e-4)
    sparsity = next(one for one in ablation.measure(setting).figures if one.id == "ablation_sparsity").value
    assert sparsity is not None
    assert 0 < sparsity <= 1
    ids = setting.dataset.tokens(0)[:9].tolist()
    text, answer = (setting.subject.tokenizer.decode(part) for part in (ids, ids[-1:]))
    found = attribute_prompt(setting, text, answer, None, 3)
    logits = setting.subject.logits([setting.subject.encode(text, setting.window)])
    assert found["metric"] == pytest.approx(logits[0, -1].log_softmax(0)[ids[-1]].item(), abs=1e-4)
    assert all(effect["ablated"] != 0 for effect in found["effects"])
    index = make_index(uri, Place(config.root, config.subject, config.storage), f"{uri}/features", None, SPEC)
    assert index.latents == setting.sae.latents
