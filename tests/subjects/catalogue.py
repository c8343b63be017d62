"""A tiny subject of every causal language model that the pinned transformers knows.

`make_subject(folder, name)` writes an ordinary Hugging Face folder (config, safetensors, tokenizer)
with seeded random weights. Configs are made by shrinking the sizes of an architecture's own default config,
field by field, by the names that such fields have in transformers; what names cannot tell stands in
`OVERRIDES`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from tests.support.tiny import make_tokenizer, raise_scale

WIDTH, HEADS, KV_HEADS, HEAD, LAYERS, VOCABULARY, CONTEXT = 32, 4, 2, 8, 4, 384, 256
TOKENS = range(16, 256)
"""Ids for test windows: none of them has a meaning of its own in any of the configs."""

CLASSES: dict[str, str] = {name: str(model) for name, model in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}
"""transformers' `model_type` -> the class that `AutoModelForCausalLM` makes of it."""

VISION = (
    "aria", "aya_vision", "cohere2_vision", "glm4v", "idefics3", "internvl", "lfm2_vl", "llava",
    "llava_next", "llava_onevision", "mistral3", "paligemma", "qwen2_5_vl", "qwen2_vl", "qwen3_vl",
    "qwen3_vl_moe", "smolvlm", "video_llama_3",
)  # fmt: skip
"""Models of text and images that only `AutoModelForImageTextToText` loads: of a text, they are its text
model."""
CLASSES |= {name: str(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name]) for name in VISION}

_SIZES: tuple[tuple[int, str], ...] = (
    (
        WIDTH,
        "hidden_size d_model n_embd emb_dim embedding_dim embedding_size input_embedding_size "
        "output_embedding_size word_embed_proj_dim attention_hidden_size lru_width backbone_hidden_size "
        "hidden_size_global input_size dim_model_base pronunciation_embed_dim shape_embed_dim ple_embed_dim "
        "projector_output_dim out_hidden_size adapter_in_dim adapter_out_dim adapter_input_size",
    ),
    (
        2 * WIDTH,
        "intermediate_size ffn_dim ffn_hidden_size decoder_ffn_dim encoder_ffn_dim n_inner dff d_inner "
        "dim_ff feed_forward_size moe_intermediate_size intermediate_size_mlp expert_ffn_hidden_size "
        "dense_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
        "shared_intermediate_size moe_shared_expert_intermediate_size mlp_dim mamba_d_ssm",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
        "num_encoder_layers num_blocks depth num_layers_per_stack",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads "
        "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads "
        "swa_num_attention_heads linear_num_heads linear_num_value_heads num_query_groups num_experts "
        "n_routed_experts num_local_experts moe_num_experts time_step_rank mamba_dt_rank "
        "zero_expert_num",
    ),
    (
        KV_HEADS,
        "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads "
        "num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k num_global_layers "
        "num_kv_shared_layers index_topk_blocks o_groups",
    ),
    (
        HEAD,
        "head_dim attention_head_dim attention_head_size kv_channels d_head dim_head swa_head_dim "
        "linear_head_dim linear_key_head_dim linear_value_head_dim index_head_dim v_head_dim "
        "qk_nope_head_dim qk_rope_head_dim rotary_dim query_pre_attn_scalar state_size ssm_state_size "
        "mamba_d_state kv_lora_rank q_lora_rank o_lora_rank adapter_rank laurel_rank "
        "hidden_size_per_layer_input router_hidden_size gated_norm_rank hc_lowrank d_rel mamba_d_head "
        "mamba_headdim mamba_head_dim mamba_n_heads mamba_num_heads index_block_size",
    ),
    (2 * HEAD, "qk_head_dim"),
    (
        VOCABULARY,
        "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size audio_vocab_size "
        "pronunciation_vocab_size shape_vocab_size",
    ),
    (
        CONTEXT,
        "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions "
        "context_length model_max_length position_bias_max_distance encoder_hash_byte_group_vocab "
        "ngram_vocab_size_base",
    ),
    (
        1,
        "n_group topk_group num_expert_group n_groups mamba_n_groups mamba_ngroups first_k_dense_replace "
        "num_dense_layers num_nextn_predict_layers",
    ),
    (
        16,
        "sliding_window sliding_window_size window_size attention_window_size chunk_size mamba_chunk_size "
        "attention_chunk_size block_size local_attention keep_window_size rel_extent index_topk "
        "local_attention_window_len lsh_attn_chunk_length local_attn_chunk_length num_buckets "
        # With few of these, exact ties at 0 are common, which sparse attention breaks one way or another.
        "index_n_heads",
    ),
)
"""A small size, and the fields that get it wherever a config has them as an integer."""

_SIZE_OF = {field: size for size, fields in _SIZES for field in fields.split()}

_MROPE = {
    "text_config.rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
    }
}
_MLA = {"num_key_value_heads": HEADS}
_QSA = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "split_ngram_parts": 2,
    "heads_per_ngram": 2,
    "ple_layer_ids": [1],
    "eos_token_id": 0,
}
_GEMMA3N = {
    "intermediate_size": [2 * WIDTH] * LAYERS,
    "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_GEMMA4 = {"global_head_dim": 2 * HEAD, "layer_types": ["sliding_attention", "full_attention"] * 2}
_DOTS3 = {
    **_MLA,
    "head_dim": 2 * HEAD,
    "layer_types": ["indexed_attention", "sliding_attention"] * 2,
    "per_layer_config": {layer: {"num_attention_heads": 2, "num_key_value_heads": 2} for layer in (1, 3)},
}
_ZAMBA = {
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "attention_hidden_size": 2 * WIDTH,
    "attention_head_dim": 2 * HEAD,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        [
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "longcat_flash",
            "minicpm3",
            "youtu",
            "kimi_linear",
            "bailing_hybrid",
            "sarvam_mla",
        ],
        _MLA,
    ),
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_v2": {**_MLA, "num_experts_per_tok": KV_HEADS},
    "dots1": {"n_routed_experts": HEADS, "num_experts_per_tok": KV_HEADS, "n_shared_experts": 1},
    "dots3_note": {
        **{f"text_config.{field}": value for field, value in _DOTS3.items()},
        "vision_config.mlp_layer_types": ["dense"] * LAYERS,
        "vision_config.num_key_value_heads": HEADS,
        "audio_config.num_key_value_heads": HEADS,
    },
    "dots3_note_text": _DOTS3,
    "dory": {"n_input_layers": 1, "n_output_layers": 1},
    "emu3": {"vocabulary_map": {"<image>": VOCABULARY - 1}},
    "gemma3n": {f"text_config.{field}": value for field, value in _GEMMA3N.items()},
    "gemma3n_text": _GEMMA3N,
    "gemma4": {f"text_config.{field}": value for field, value in _GEMMA4.items()},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {f"text_config.{field}": value for field, value in _GEMMA4.items()},
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "deepseek_v4": {
        "layer_types": [
            "sliding_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "sliding_attention",
        ],
        "mlp_layer_types": ["hash_moe", "moe", "hash_moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "glm4v": _MROPE,
    "qwen2_vl": _MROPE,
    "qwen2_5_vl": _MROPE,
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "inkling2_loop_text": {
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": HEAD},
    "minimax_m3_vl_text": {
        "index_n_heads": HEADS,
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "mlp_layer_types": ["dense", "sparse"] * 2,
    },
    "nemotron_h": {"time_step_min": 0.1},
    "nemotron": {"num_key_value_heads": KV_HEADS, "head_dim": HEAD},
    "qwen4_exp": {f"text_config.{field}": value for field, value in _QSA.items()},
    "qwen4_exp_text": _QSA,
    "reformer": {
        "is_decoder": True,
        "hash_seed": 0,  # else every pass draws its buckets anew
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"] * 2,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": {**_ZAMBA, "time_step_min": 0.1, "mamba_headdim": HEAD, "kv_channels": HEAD},
    "zaya": {"num_experts_per_tok": 1},
}
"""Fields that no name tells, by `model_type`; a dotted name reaches into a nested config."""

_DRAFTS = "drafts for another model, whose keys and values it has to be given"
_MUSIC = "AutoModelForCausalLM hands its decoder the config of the whole, which the decoder does not take"
NOT_BUILT: dict[str, str] = {
    "gemma3n": "its vision tower needs the timm library; its text alone is `gemma3n_text`",
    "gemma4_assistant": _DRAFTS,
    "gemma4_unified_assistant": _DRAFTS,
    "musicgen": _MUSIC,
    "musicgen_melody": _MUSIC,
}
"""`model_type` -> why it has no tiny subject."""


_ENCODERS = [
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{encoder}, is_decoder": (encoder, {"is_decoder": True}) for encoder in _ENCODERS},
    "falcon, alibi": ("falcon", {"alibi": True, "parallel_attn": False}),
    "falcon, two norms": ("falcon", {"new_decoder_architecture": True}),
    "gemma4_text, experts": (
        "gemma4_text",
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    ),
    "gemma4_text, shared keys": ("gemma4_text", {"num_kv_shared_layers": 2}),
    "phi3, longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * (HEAD // 2),
                "long_factor": [4.0] * (HEAD // 2),
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "xlm, causal": ("xlm", {"causal": True}),
}
"""Forms of an architecture that are other models: name -> (`model_type`, fields)."""

SUBJECTS: tuple[str, ...] = tuple(sorted([*CLASSES, *VARIANTS]))
"""Every name that `make_subject` takes, and those in `NOT_BUILT`."""


def tiny_config(name: str, **extra: Any) -> PretrainedConfig:
    """The smallest config of a subject that keeps every kind of its layers; `extra` fields win."""
    model_type, fields = VARIANTS.get(name, (name, {}))
    return _shrunk(model_type, {**OVERRIDES.get(model_type, {}), **fields, **extra})


def _shrunk(model_type: str, overrides: dict[str, Any]) -> PretrainedConfig:
    config_class: Any = CONFIG_MAPPING[model_type]
    own = {name: value for name, value in overrides.items() if "." not in name}
    try:
        default = config_class()
    except ValueError:  # some defaults are refused by their own class
        default = config_class(**own)
    fields = _small_fields(default)
    for name in default.sub_configs:
        if isinstance(part := getattr(default, name, None), PretrainedConfig):
            inner = {
                key.removeprefix(name + "."): value
                for key, value in overrides.items()
                if key.startswith(name + ".")
            }
            fields[name] = _with_every_kind(type(part), part, {**_small_fields(part), **inner}).to_dict()
    return _with_every_kind(config_class, default, {**fields, **own})


def _with_every_kind(
    config_class: Any, default: PretrainedConfig, fields: dict[str, Any]
) -> PretrainedConfig:
    """A config of `fields` whose layers are of every kind that the default's are."""
    lists = {
        name: list(dict.fromkeys(kinds))
        for name in ("layer_types", "layers_block_type", "block_types", "mlp_layer_types")
        if name not in fields and (kinds := getattr(default, name, None))
    }
    small = None
    try:
        small = config_class(**fields)
        lost = [name for name, kinds in lists.items() if not set(kinds) <= set(getattr(small, name) or ())]
    except ValueError:  # the default's own list of kinds is too long
        lost = [name for name in lists if name != "mlp_layer_types"]
        if not lost:
            raise
    if small is not None and not lost:
        return small
    cycled = {name: [lists[name][layer % len(lists[name])] for layer in range(LAYERS)] for name in lost}
    return config_class(**fields, **cycled)


def _small_fields(config: PretrainedConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        if name in _SIZE_OF and value > 0:
            fields[name] = _SIZE_OF[name]
        elif name.endswith(("_token_id", "_token_index", "_index")) and value >= VOCABULARY:
            fields[name] = VOCABULARY - 1 - sum(ord(letter) for letter in name) % 64
    return fields


def tiny_model(name: str, *, seed: int = 0, **extra: Any) -> PreTrainedModel:
    """A random float32 model in eval mode; the weights' scale is raised so that every part matters.

    Where a model of text and images is published whole, it is that one: `AutoModelForCausalLM` takes the
    text's part when it loads it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = tiny_config(name, **extra)
        whole = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        model = (AutoModelForImageTextToText if whole else AutoModelForCausalLM).from_config(config)
        raise_scale(model)
    return model.float().eval()


def make_subject(folder: str | Path, name: str, *, seed: int = 0, **extra: Any) -> Path:
    """Write a tiny subject into `folder` (made if absent) and return the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model(name, seed=seed, **extra)
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    make_tokenizer(320).save_pretrained(folder)
    return folder
