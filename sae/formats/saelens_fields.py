"""Every field that any version of SAELens has written to `cfg.json`, and how it is used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from winnow.sae.formats.fields import require_types, unknown_fields, words
from winnow.sae.formats.names import LENS_ANY
from winnow.schemas.errors import ConfigError, IntegrityError
from winnow.schemas.training import Activation

ACTIVATIONS: dict[str, Activation] = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "jumprelu",
    "batchtopk": "batchtopk",
    "matryoshka_batchtopk": "batchtopk",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_OF_EVERY_SAE = {"W_enc", "W_dec", "b_dec", "scaling_factor"}
_THRESHOLDS = {"jumprelu": {"threshold", "log_threshold"}, "batchtopk": {"topk_threshold"}}

USED = words("""
    activation_fn activation_fn_kwargs activation_fn_str apply_b_dec_to_input architecture d_in d_out
    d_sae disable_concat_sequences exclude_special_tokens finetuning_scaling_factor hf_hook_name
    hf_hook_name_out hook_head_index hook_head_index_out hook_layer hook_name hook_name_out hook_point
    hook_point_head_index hook_point_layer k matryoshka_widths metadata model_class_name
    model_from_pretrained_kwargs model_kwargs model_name normalize_activations prepend_bos
    rescale_acts_by_decoder_norm reshape_activations sae_lens_training_version sae_lens_version
    seqpos_slice sequence_separator_token training_architecture_details use_chat_formatting
    """)
OF_TRAINING = words("""
    act_store_device activations_mixing_fraction adam_beta1 adam_beta2 autocast autocast_lm
    aux_loss_coefficient b_dec_init_method cached_activations_path checkpoint_path compile_llm compile_sae
    context_size data_dir dataset_path dataset_trust_remote_code dead_feature_threshold
    dead_feature_window decoder_heuristic_init decoder_heuristic_init_norm decoder_init_norm
    decoder_orthogonal_init device dtype eval_batch_size_prompts
    eval_every_n_wandb_logs expansion_factor feature_sampling_method feature_sampling_window
    finetuning_method finetuning_tokens from_pretrained_path hook_eval hook_layer_out hook_point_eval
    hook_point_layer_out init_encoder_as_decoder_transpose is_dataset_tokenized jumprelu_bandwidth
    jumprelu_init_threshold jumprelu_sparsity_loss_mode jumprelu_ste_to_input jumprelu_tanh_scale
    l0_coefficient l0_warm_up_steps l1_coefficient l1_warm_up_steps llm_compilation_mode llm_device
    log_activations_store_to_wandb log_optimizer_state_to_wandb log_to_wandb log_weights_to_wandb logger
    lp_norm lr lr_decay_steps lr_end lr_scheduler_name lr_warm_up_steps model_batch_size mse_loss_method
    mse_loss_normalization n_batches_for_norm_estimate n_batches_in_buffer n_checkpoints n_eval_batches
    n_restart_cycles neuronpedia_id new_cached_activations_path noise_scale normalize_sae_decoder
    output_path pre_act_loss_coefficient prefetch_llm_batches resume resume_from_checkpoint run_name
    sae_compilation_mode save_final_checkpoint scale_sparsity_penalty_by_decoder_norm seed
    sparsity_penalty store_batch_size store_batch_size_prompts streaming
    target_l0 tokens_per_buffer topk_threshold_lr total_training_steps total_training_tokens
    train_batch_size train_batch_size_tokens training_architecture training_tokens use_cached_activations
    use_ghost_grads use_matryoshka_aux_loss use_sparse_activations verbose wandb_entity wandb_id
    wandb_log_frequency wandb_project
    """)
"""Fields about training, data and devices, which do not affect what the SAE computes."""
_TYPES: dict[type, frozenset[str]] = {
    bool: words("apply_b_dec_to_input rescale_acts_by_decoder_norm"),
    str: words("""
        activation_fn activation_fn_str architecture dtype hf_hook_name hf_hook_name_out hook_name
        hook_name_out hook_point model_class_name model_name reshape_activations
        """),
    dict: words("activation_fn_kwargs metadata model_from_pretrained_kwargs training_architecture_details"),
    list: words("matryoshka_widths"),
}
# Values of `seqpos_slice` that select every position.
_ALL_POSITIONS = (None, [], [None], [None, None], [0, None], [None, None, None])
_NORMALISATIONS = {
    "expected_average_only_in": "Its factor is not in the files: fold it with SAELens first",
    "constant_norm_rescale": "It scales each row to one norm and does not centre it: Winnow has no such part",
    "covariance_whitening": "Its matrices are not in the files: fold them with SAELens first",
}


def joined(config: Mapping[str, Any], origin: Path) -> dict[str, Any]:
    """All fields of a `cfg.json` at one level.

    Raises:
        IntegrityError: A field is of another type than SAELens writes.
    """
    # Up to version 5 everything was at the top level; version 6 moved what an SAE does not compute with to
    # `metadata`.
    require_types(config, _TYPES, origin)
    about = {**config, **(config.get("metadata") or {})}
    require_types(about, _TYPES, origin)
    return about


def kind_of(config: Mapping[str, Any], origin: Path) -> tuple[str, Activation]:
    """The architecture, and its activation in Winnow.

    Raises:
        ConfigError: An architecture or an activation function that Winnow does not have.
    """
    function = config.get("activation_fn_str") or config.get("activation_fn") or "relu"
    architecture = str(config.get("architecture") or "standard")
    # Before version 6 TopK was a `standard` SAE with another activation function.
    if function == "topk" and architecture == "standard":
        architecture = "topk"
    if architecture not in ACTIVATIONS:
        raise ConfigError(f"{origin}: architecture", expected=", ".join(ACTIVATIONS), got=architecture)
    # SAELens 6 reads a `tanh-relu` SAE of version 5 as ReLU and gives other codes than it was trained with
    # (findings/sae_lens_drops_tanh_relu.sh): refused here.
    if function not in ({"relu", "topk"} if architecture == "topk" else {"relu"}):
        raise ConfigError(
            f"{origin}: the activation function of a {architecture} SAE",
            expected="relu" + (" or topk" if architecture in ("topk", "standard") else ""),
            got=function,
            fix="Winnow has no such activation: its codes would differ",
        )
    settings = {k: v for k, v in (config.get("activation_fn_kwargs") or {}).items() if k != "k" and v}
    if settings:
        raise ConfigError(f"{origin}: activation_fn_kwargs", expected="k alone", got=settings)
    return architecture, ACTIVATIONS[architecture]


def tensors_of(architecture: str) -> set[str]:
    """Every tensor that an SAE of an architecture may have."""
    if architecture == "gated":
        return _OF_EVERY_SAE | {"b_gate", "b_mag", "r_mag"}
    skip = {"W_skip"} if "skip" in architecture else set[str]()
    return _OF_EVERY_SAE | {"b_enc"} | _THRESHOLDS.get(ACTIVATIONS[architecture], set()) | skip


def is_layer_normed(config: Mapping[str, Any], origin: Path) -> bool:
    """Whether rows are layer-normed.

    Raises:
        ConfigError: A normalisation whose factors are not in the files, or that Winnow does not have.
    """
    mode = config.get("normalize_activations") or "none"
    # A bool in old files; version 6 reads it this way.
    mode = "expected_average_only_in" if mode is True else mode
    if mode not in ("none", "layer_norm"):
        fix = _NORMALISATIONS.get(mode, "Winnow does not know it")
        raise ConfigError(
            f"{origin}: normalize_activations", expected="none or layer_norm", got=mode, fix=fix
        )
    return mode == "layer_norm"


def notes_on(config: Mapping[str, Any], about: Mapping[str, Any], origin: Path) -> tuple[str, ...]:
    """Notes on what the fields say about the rows and an SAE cannot hold, and on unknown fields."""
    notes: list[str] = []
    # Its own rows and weights are rounded to it; ours are float32 whatever the file holds.
    if (dtype := str(about.get("dtype") or "")).endswith("float16"):
        notes.append(
            f"SAELens computes it in {dtype} (dtype), Winnow in float32: codes differ by that rounding, and "
            "a latent near its threshold or the K-th place may be active in one alone"
        )
    if about.get("prepend_bos"):
        notes.append(
            "its contexts began with BOS (prepend_bos), unless its dataset was tokenised already: to such a "
            "one SAELens adds none. Harvest with `plan.bos: window`"
        )
    notes.extend(_notes_on_joins(about))
    for name in ("hook_head_index", "hook_point_head_index", "hook_head_index_out"):
        if about.get(name) is not None:
            notes.append(f"it reads one head alone ({name}: {about[name]}), which Winnow does not read")
    if (slice_ := about.get("seqpos_slice")) not in _ALL_POSITIONS:
        notes.append(f"its rows came from the positions {slice_} of each context alone (seqpos_slice)")
    if tokens := about.get("exclude_special_tokens"):
        which = "special tokens" if tokens is True else f"the tokens {tokens}"
        notes.append(f"its rows left out {which} (exclude_special_tokens)")
    if about.get("use_chat_formatting"):
        notes.append("its texts were chats in their template (use_chat_formatting)")
    if about.get("model_kwargs"):
        notes.append(f"its subject ran with {about['model_kwargs']} (model_kwargs)")
    hook, layer = _first(about, "hook_name", "hook_point"), _first(about, "hook_layer", "hook_point_layer")
    # The name decides, since it is what the library hooks.
    match = LENS_ANY.fullmatch(str(hook)) and str(hook).split(".")[:2]
    if layer is not None and match and match[0] == "blocks" and match[1] != str(layer):
        notes.append(f"hook_layer {layer} is not that of {hook}, which is used")
    if about.get("rescale_acts_by_decoder_norm") and "topk" not in str(config.get("architecture")):
        notes.append("rescale_acts_by_decoder_norm is ignored, as SAELens does unless it is a TopK")
    return (*notes, *unknown_fields(about, USED | OF_TRAINING, origin))


def _notes_on_joins(about: Mapping[str, Any]) -> list[str]:
    """A note on what its contexts hold beside BOS and text; none if the files do not say."""
    if about.get("disable_concat_sequences"):
        return [
            "its contexts were beginnings of documents, one each, and shorter documents were left out "
            "(disable_concat_sequences)"
        ]
    if "sequence_separator_token" not in about:
        return []
    token = about["sequence_separator_token"]
    if token is None:
        return [
            "nothing stood between its documents (sequence_separator_token): Winnow joins them by a token"
        ]
    how = f"`plan.join: {token}`" if token in ("bos", "eos") else "`plan.join` and that token's text"
    return [f"its documents were joined by the token {token} (sequence_separator_token): harvest with {how}"]


def k_of(config: Mapping[str, Any], latents: int, origin: Path) -> int | None:
    """K, of any version; rounded, since BatchTopK may have been trained with a fraction.

    Raises:
        IntegrityError: It is no number from 1 to the number of latents, or is given twice and differs.
    """
    said = [config.get("k"), (config.get("activation_fn_kwargs") or {}).get("k")]
    numbers = [k for k in said if k is not None]
    if not numbers:
        return None
    k = numbers[0]
    # Version 6 uses the first, earlier ones the second.
    if not isinstance(k, int | float) or not 0 < k <= latents or numbers[-1] != k:
        raise IntegrityError(
            f"{origin}: k and activation_fn_kwargs.k",
            expected=f"one number from 1 to {latents}",
            got=" and ".join(map(repr, said)),
        )
    return max(1, round(k))


def matryoshka_of(config: Mapping[str, Any], latents: int) -> tuple[int, ...]:
    """The prefixes that it was trained with; () if it is not Matryoshka."""
    # SAELens publishes it as JumpReLU and keeps the prefixes in the metadata only.
    details = (config.get("metadata") or {}).get("training_architecture_details") or {}
    widths = tuple(config.get("matryoshka_widths") or details.get("matryoshka_widths") or ())
    # Prefixes matter in training only, so wrong ones are no reason to refuse an SAE.
    return widths if widths and widths[-1] == latents else ()


def _first(about: Mapping[str, Any], *names: str) -> Any:
    return next((about[name] for name in names if about.get(name) is not None), None)
