"""Subjects of a dozen kinds are right or refused; `make test-subjects` tries all of docs/subjects.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.subjects.checks import examine

RESIDUAL = "resid_pre, resid_post"
ALL = "resid_pre, resid_post, attn_out, mlp_out, resid_mid, mlp_in, attn_z"

FAMILIES = {
    "bamba": (f"{ALL} (layers 1, 3)", "right", "cached", "right", "refused"),
    "bert, is_decoder": (RESIDUAL, "right", "cached", "right", "refused"),
    "gemma2": (ALL, "right", "cached", "right", "apart"),
    "gemma3": (ALL, "right", "cached", "right", "apart"),
    "deepseek_v3": (f"{ALL}, router (layers 1, 2, 3)", "right", "cached", "right", "apart"),
    "gemma4_text, experts": (f"{RESIDUAL}, router", "right", "cached", "right", "apart"),
    "gemma4_text, shared keys": (RESIDUAL, "right", "cached", "right", "apart"),
    "mamba": (RESIDUAL, "right", "cached", "right", "refused"),
    "llava": (ALL, "right", "cached", "right", "apart"),
    "llama4_text": (f"{ALL}, router", "right", "cached", "right", "apart"),
    "mixtral": (f"{ALL}, router", "right", "cached", "right", "apart"),
    "opt": (ALL, "right", "cached", "right", "refused"),
    "openai-gpt": (RESIDUAL, "right", "whole passes", "right", "refused"),
    "phi3, longrope": (ALL, "right", "cached in parts", "right", "apart"),
    "qwen3_5_text": (f"{ALL} (layers 3)", "right", "cached", "right", "refused"),
    "zaya": (RESIDUAL, "right", "cached", "right", "refused"),
}
"""Sites, truncation, generation, tail and documents of: state space beside attention (which alone has heads),
an encoder made causal, experts in whose choice a bias has a say, soft caps, text and images, experts chosen
by probabilities, keys of other layers, experts that all run, a state space alone, a text tower, experts, an
MLP without a module, no cache, rows that depend on the window's length, linear attention, and blocks that
hand on more than the stream."""


@pytest.mark.parametrize("name", FAMILIES)
def test_right_in_every_way(name: str, tmp_path: Path) -> None:
    row = examine(name, tmp_path)
    assert not row.faults
    assert (row.sites, row.truncation, row.generation, row.tail, row.documents) == FAMILIES[name]


@pytest.mark.parametrize(
    ("name", "what", "sentence"),
    [
        ("bert", "load", "no causal language model"),
        ("cpmant", "load", "no causal language model"),
        ("blt", "load", "its blocks cannot be told"),
        ("deepseek_v4", "resid_post", "'deepseek_v4' has 4 residual streams, not one"),
    ],
)
def test_refused_with_a_sentence(name: str, what: str, sentence: str, tmp_path: Path) -> None:
    row = examine(name, tmp_path)
    assert not row.faults
    assert any(said == what and sentence in text for said, text in row.notes)
    assert row.sites in ("—", "none", "router")
