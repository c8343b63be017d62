"""Tiny random subjects of every architecture the hooks know, with a real tokenizer, for tests.

`make_subject(folder)` writes an ordinary Hugging Face folder: `config.json`, `model.safetensors`,
tokenizer files. Weights are seeded, so the same call gives the same folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

EOS = "<|endoftext|>"
SENTENCES = (
    "It is a truth universally acknowledged, that a quick brown fox jumps over the lazy dog.",
    "The harvest is past, the summer is ended, and the winnowing of the grain has begun.",
    "Sparse autoencoders read what a language model writes into its residual stream.",
    "def add(a, b):\n    return a + b  # 1, 2, 3, 4, 5, 6, 7, 8, 9 and 0",
    "Où êtes-vous? Straße, naïve, 東京: bytes are enough for every script.",
)
"""What the tokenizer is trained on; also a corpus when a test needs only a few words."""

ARCHITECTURES = (
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmo",
    "olmo2",
    "olmo3",
    "phi",
    "phi3",
    "smollm3",
    "stablelm",
    "starcoder2",
)
"""transformers' `model_type` of every architecture that `tiny_config` knows."""

OTHERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "deepseek_v4": {
        "num_key_value_heads": 1, "head_dim": 8, "q_lora_rank": 8, "o_lora_rank": 8, "o_groups": 2,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "sliding_window": 16,
        "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4,
    },
    "electra": {"embedding_size": 32},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0}},
    "gptj": {"n_layer": 2, "n_embd": 32, "n_head": 4, "rotary_dim": 4, "n_positions": 256},
    "mamba": {"state_size": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "expansion_ratio": 2},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention"] * 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 8, "hc_lowrank": 8,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "roberta": {"pad_token_id": 1},
}  # fmt: skip
"""`model_type` -> the fields that make a small one, with `layers=2`, of architectures outside the table."""


def make_tokenizer(vocab: int = 384, sentences: Iterable[str] = SENTENCES) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab` entries (at least 257) whose entry 0 is EOS; it has no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def tiny_config(
    architecture: str = "llama", *, layers: int = 4, width: int = 32, vocab: int = 384, **extra: Any
) -> PretrainedConfig:
    """A config with 4 heads, an MLP of twice the width and contexts up to 256; `extra` fields win."""
    common = {"vocab_size": vocab, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    if architecture == "gpt2":
        sizes = {"n_layer": layers, "n_embd": width, "n_head": 4, "n_positions": 256, "n_inner": 2 * width}
        return AutoConfig.for_model("gpt2", **{**sizes, **common, **extra})
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": 4,
        "intermediate_size": 2 * width,
        "max_position_embeddings": 256,
    }
    if architecture != "gpt_neox":
        sizes["num_key_value_heads"] = 4 if architecture in ("phi", "phi3") else 2
    if architecture in ("qwen3", "gemma", "gemma2", "gemma3_text"):
        sizes["head_dim"] = width // 4
    if architecture in ("gemma2", "gemma3_text"):
        sizes["query_pre_attn_scalar"] = width // 4
    return AutoConfig.for_model(architecture, **{**sizes, **common, **extra})


def tiny_model(
    architecture: str = "llama",
    *,
    layers: int = 4,
    width: int = 32,
    vocab: int = 384,
    seed: int = 0,
    **extra: Any,
) -> PreTrainedModel:
    """A random float32 model in eval mode; the weights' scale is raised so that every part matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = tiny_config(architecture, layers=layers, width=width, vocab=vocab, **extra)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        raise_scale(model)
    return model.float().eval()


def raise_scale(model: PreTrainedModel) -> None:
    """Draw a model's weights anew, large enough that every part matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.7 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def make_subject(
    folder: str | Path,
    architecture: str = "llama",
    layers: int = 4,
    width: int = 32,
    vocab: int = 384,
    seed: int = 0,
    **extra: Any,
) -> Path:
    """Write a tiny subject into `folder` (made if absent); returns it. `extra` as in `tiny_config`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model(architecture, layers=layers, width=width, vocab=vocab, seed=seed, **extra)
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    make_tokenizer(vocab).save_pretrained(folder)
    return folder
