"""Llama Scope's layouts: those of its first release, and those of its library (lm-saes, now Llamascopium).

Legend: D width, N latents.

- Llama Scope: `hyperparams.json`, `checkpoints/final.safetensors` of `encoder.weight` [N, D], `encoder.bias`,
  `decoder.weight` [D, N], `decoder.bias`; one threshold, in the config;
- its R1 Distill: `config.json`, `sae_weights.safetensors` of the same and `log_jumprelu_threshold` [N];
- the library since: the same files, of `W_E` [D, N], `b_E`, `W_D` [N, D], `b_D` and
  `activation_function.log_jumprelu_threshold` [N].

Nothing is subtracted from the input. With `norm_activation: dataset-wise` rows are multiplied by
``f = sqrt(D) / norm``, norms being the average ones of the input's and the output's hook, and outputs are
divided by theirs. With `sparsity_include_decoder_norm` an activation sees ``pre |W_D row|``. Thresholds
belong to rows that are multiplied by f, except the one number `jump_relu_threshold` of the first release:
that was fitted after both factors were folded in, to raw rows.

Codes here are those of raw rows, as the library's own inference mode has them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from winnow.sae.formats.fields import refuse_tensors, require_size, unknown_fields, words
from winnow.sae.formats.files import (
    folder_of,
    read_json,
    read_safetensors,
    refuse,
    require,
    take,
    take_matrix,
    write_json,
    write_safetensors,
)
from winnow.sae.formats.names import from_lens, parse_lens, to_lens
from winnow.sae.formats.plain import Plain
from winnow.schemas.errors import ConfigError, IntegrityError
from winnow.schemas.training import Activation

NAME = "llama-scope"
FIRST_CONFIG, CONFIG = "hyperparams.json", "config.json"
FIRST_WEIGHTS, WEIGHTS = "checkpoints/final.safetensors", "sae_weights.safetensors"
_NORM = "dataset_average_activation_norm"
_NAMES = {"encoder.weight": "W_E", "encoder.bias": "b_E", "decoder.weight": "W_D", "decoder.bias": "b_D"}
_THRESHOLDS = ("activation_function.log_jumprelu_threshold", "log_jumprelu_threshold")
_ONE_THRESHOLD = "jump_relu_threshold"
_ACTIVATIONS: dict[str, Activation] = {"relu": "relu", "jumprelu": "jumprelu", "topk": "topk"}
USED = words(
    f"{_NORM} {_ONE_THRESHOLD} act_fn apply_decoder_bias_to_pre_encoder d_model d_sae expansion_factor "
    "hook_point_in hook_point_out model_name norm_activation sae_type sparsity_include_decoder_norm top_k "
    "use_decoder_bias use_glu_encoder"
)
OF_TRAINING = words(
    """
    ddp_size decoder_exactly_fixed_norm device dtype force_unit_decoder_norm init_decoder_norm
    init_encoder_norm init_encoder_with_decoder_transpose init_encoder_with_decoder_transpose_factor
    jumprelu_threshold_window k_warmup_steps l1_coefficient l1_coefficient_warmup_steps lp
    promote_act_fn_dtype sae_pretrained_name_or_path seed sparsity_threshold_for_triton_spmm_kernel
    strict_loading tp_size use_batch_norm_mse use_triton_kernel version
    """
)
# What its library computes and Winnow does not; each with the value that means "not".
_REFUSED = {"use_glu_encoder": False, "apply_decoder_bias_to_pre_encoder": False, "sae_type": "sae"}


# ---- import --------------------------------------------------------------------------------------


def read(path: Path) -> Plain:
    """Read the folder of one SAE or transcoder."""
    folder = folder_of(path)
    folder = folder.parent if folder.name == "checkpoints" else folder
    first = (folder / FIRST_CONFIG).is_file()
    origin, file = (folder / name for name in ((FIRST_CONFIG, FIRST_WEIGHTS) if first else (CONFIG, WEIGHTS)))
    config, found = read_json(origin), read_safetensors(require(file))
    _refuse_parts(config, origin)
    tensors = {_NAMES.get(name, name): tensor for name, tensor in found.items()}
    norms = {name for name in tensors if name.startswith(f"{_NORM}.")}
    refuse_tensors(tensors, {*_NAMES.values(), *_THRESHOLDS, *norms}, file)
    W_enc, W_dec = take_matrix(tensors, "W_E", file), take_matrix(tensors, "W_D", file)
    # Of `nn.Linear`, which holds both the other way round.
    if "encoder.weight" in found:
        W_enc, W_dec = W_enc.T, W_dec.T
    W_enc = W_enc.T
    latents, width = W_enc.shape
    # Before the arithmetic, which would broadcast some of the wrong shapes.
    _require_length(tensors, ("b_E", *_THRESHOLDS), latents, file)
    if len(W_dec) != latents:
        raise IntegrityError(f"{file}: W_D", expected=f"{latents} latents", got=len(W_dec))
    require_size(origin, "d_model", config.get("d_model"), width)
    require_size(origin, "d_sae", config.get("d_sae"), latents)
    bias = config.get("use_decoder_bias", True)
    b_dec = take(tensors, "b_D", file) if bias else torch.zeros(W_dec.shape[1])
    hooks = [str(config.get(f"hook_point_{side}") or "") for side in ("in", "out")]
    hooks[1] = hooks[1] or hooks[0]
    f_in, f_out = _factors(config, tensors, hooks, width, origin)
    # As its inference mode folds them: codes are those of raw rows.
    W_dec, b_dec, b_enc = W_dec * (f_in / f_out), b_dec / f_out, take(tensors, "b_E", file) / f_in
    activation, threshold = _activation(config, tensors, file, origin)
    by_norm, rows = config.get("sparsity_include_decoder_norm", True), W_dec.norm(dim=1)
    if threshold is not None and not any(name in tensors for name in _THRESHOLDS):
        threshold = threshold / rows if by_norm else threshold
    elif threshold is not None:
        # ``f_in z |file's row| > threshold``, and the file's row is f_out / f_in times the folded one.
        threshold = threshold / (rows * f_out) if by_norm else threshold / f_in
    # TopK chooses by code times norm: with rows of norm 1 that is the code.
    elif activation == "topk" and by_norm and bool((rows > 0).all()):
        W_enc, b_enc, W_dec = W_enc * rows[:, None], b_enc * rows, W_dec / rows[:, None]
    transcoder = hooks[0] != hooks[1]
    return Plain(
        activation=activation,
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_in=torch.zeros(width),
        b_out=b_dec,
        k=_k(config, origin) if activation == "topk" else None,
        # A latent without a decoder is never active there; its threshold must be finite here.
        threshold=None if threshold is None else threshold.clamp_max(torch.finfo(torch.float32).max),
        transcoder=transcoder,
        hook=from_lens(hooks[0]),
        target_hook=from_lens(hooks[1]) if transcoder else None,
        model=config.get("model_name"),
        notes=(*_place_notes(hooks), *unknown_fields(config, USED | OF_TRAINING, origin)),
    )


def _refuse_parts(config: Mapping[str, Any], origin: Path) -> None:
    for field, expected in _REFUSED.items():
        if (said := config.get(field, expected)) != expected:
            raise ConfigError(
                f"{origin}: {field}",
                expected=expected,
                got=said,
                fix="Winnow has no such part: it would give other numbers",
            )


def _require_length(tensors: Mapping[str, Tensor], names: tuple[str, ...], length: int, file: Path) -> None:
    for name in names:
        if name in tensors and tuple(tensors[name].shape) != (length,):
            raise IntegrityError(f"{file}: {name}", expected=(length,), got=tuple(tensors[name].shape))


def _factors(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], hooks: list[str], width: int, origin: Path
) -> tuple[float, float]:
    """What rows of the input's and the output's hook are multiplied by; 1 and 1 if they are raw."""
    mode = config.get("norm_activation", "dataset-wise")
    if mode == "inference":
        return 1.0, 1.0
    if mode != "dataset-wise":
        raise ConfigError(
            f"{origin}: norm_activation",
            expected="dataset-wise or inference",
            got=mode,
            fix="It divides each row by its own norm without centring it, which Winnow does not",
        )
    said = config.get(_NORM) or {}
    factors: list[float] = []
    for side, hook in zip(("in", "out"), hooks, strict=True):
        stored = tensors.get(f"{_NORM}.{hook}")
        norm = stored.item() if stored is not None and stored.numel() == 1 else said.get(side, said.get(hook))
        if not isinstance(norm, int | float) or not math.isfinite(norm) or norm <= 0:
            raise IntegrityError(
                f"the average norm of {hook or side} in {origin.parent}",
                expected=f"a number above 0, in {origin.name} or as a tensor {_NORM}.{hook}",
                got=norm,
            )
        factors.append(width**0.5 / norm)
    return factors[0], factors[1]


def _activation(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], file: Path, origin: Path
) -> tuple[Activation, Tensor | None]:
    """The activation and the thresholds [N]."""
    name, one = str(config.get("act_fn", "relu")).lower(), config.get(_ONE_THRESHOLD)
    # A TopK of the first release that has a threshold is used as a JumpReLU.
    if name == "topk" and isinstance(one, int | float) and one > 0:
        name = "jumprelu"
    if name not in _ACTIVATIONS:
        fix = "Its active latents depend on the whole batch: convert it to jumprelu with its library"
        raise ConfigError(
            f"{origin}: act_fn",
            expected=", ".join(_ACTIVATIONS),
            got=name,
            fix=fix if "batch" in name else None,
        )
    if name != "jumprelu":
        return _ACTIVATIONS[name], None
    for stored in _THRESHOLDS:
        if stored in tensors:
            return "jumprelu", take(tensors, stored, file).exp()
    if not isinstance(one, int | float) or not math.isfinite(one) or one <= 0:
        raise IntegrityError(f"{origin}: {_ONE_THRESHOLD}", expected="a number above 0", got=one)
    return "jumprelu", torch.full((tensors["b_E"].numel(),), float(one))


def _k(config: Mapping[str, Any], origin: Path) -> int:
    k = config.get("top_k")
    if not isinstance(k, int) or k < 1:
        raise IntegrityError(f"{origin}: top_k", expected="the number of active latents per row", got=k)
    return k


def _place_notes(hooks: list[str]) -> tuple[str, ...]:
    odd = [hook for hook in dict.fromkeys(hooks) if hook and parse_lens(hook) is None]
    return tuple(f"{hook} is no hook that Winnow reads" for hook in odd)


# ---- export --------------------------------------------------------------------------------------


def write(plain: Plain, folder: Path) -> None:
    """Write `config.json` and `sae_weights.safetensors`, for `SparseDictionary.from_pretrained(DIR)`."""
    if plain.epsilon is not None:
        raise refuse(
            NAME,
            "an SAE of layer-normed rows: it reads raw ones",
            "Each row has its own mean and norm, which weights cannot express. Export to openai or saelens",
        )
    if plain.W_skip is not None:
        raise refuse(NAME, "a skip connection", "Export to sparsify or saelens")
    latents, width = plain.W_enc.shape
    if plain.W_dec.shape[1] != width:
        raise refuse(NAME, "a transcoder between hooks of two widths", "Export to another format")
    # The format subtracts nothing from its input, so the input's bias is folded into `b_enc`.
    plain = plain.taking(torch.zeros_like(plain.b_in)).single()
    jump = plain.activation in ("jumprelu", "batchtopk")
    hooks = [to_lens(plain.hook) or "unknown"]
    hooks.append((to_lens(plain.target_hook) or "unknown_target") if plain.transcoder else hooks[0])
    tensors = {
        "W_E": plain.W_enc.T.contiguous(),
        "b_E": plain.b_enc,
        "W_D": plain.W_dec,
        "b_D": plain.b_out,
        **{f"{_NORM}.{hook}": torch.tensor(1.0) for hook in hooks},
    }
    if jump:
        # It stores logarithms: the smallest number that has one stands for a threshold of 0.
        tensors[_THRESHOLDS[0]] = plain.thresholds.clamp_min(torch.finfo(torch.float32).tiny).log()
    factor = latents / width
    # Its reader takes int(d_model * expansion_factor), which may round down.
    while int(width * factor) < latents:
        factor = math.nextafter(factor, math.inf)
    config = {
        "sae_type": "sae",
        "hook_point_in": hooks[0],
        "hook_point_out": hooks[1],
        "d_model": width,
        "expansion_factor": factor,
        "use_decoder_bias": True,
        "use_glu_encoder": False,
        "act_fn": "jumprelu" if jump else plain.activation,
        "norm_activation": "inference",
        "sparsity_include_decoder_norm": False,
        "top_k": plain.k or 1,
    }
    write_safetensors(tensors, folder / WEIGHTS)
    write_json(folder / CONFIG, config)
