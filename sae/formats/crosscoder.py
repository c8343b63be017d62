"""CrossCoder and BatchTopKCrossCoder of the branch of dictionary_learning that science-of-finetuning keeps.

Legend: H hooks, D width of each, N latents.

A folder with `config.json` and `model.safetensors`, as its `from_pretrained(..., from_hub=True)` takes it, or
a `.pt` state dict. `encoder.weight` [H, D, N], `encoder.bias` [N], `decoder.weight` [H, N, D], `decoder.bias`
[H, D]; nothing is subtracted from the input. CrossCoder is a ReLU. BatchTopKCrossCoder has a `threshold` for
codes *times a norm of the decoder's rows*, which `code_normalization_id` selects:

| id | name | norm of latent n |
|---|---|---|
| 1 | CROSSCODER | sum over hooks of the rows' norms |
| 2 | SAE | norm of the joined rows |
| 3 | MIXED | a weighted sum of both |
| 4 | NONE | 1 |
| 5 | DECOUPLED | one per hook, codes too: refused |

`activation_mean` [H, D] and `activation_global_scale` [H] normalise rows, unless the mean is NaN.
The files do not say which hooks are read; ours name them in the weights' metadata.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from winnow.sae.formats.fields import refuse_tensors, require_size, unknown_fields, words
from winnow.sae.formats.files import (
    Kind,
    kind_of_file,
    read_json,
    read_pt,
    read_safetensors,
    refuse,
    require,
    take,
    write_json,
    write_safetensors,
)
from winnow.sae.formats.plain import Plain
from winnow.schemas.errors import ConfigError, IntegrityError
from winnow.schemas.training import Activation

NAME = "crosscoder"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
HOOKS = "winnow_hooks"
"""Key of the hooks in the weights' metadata. Not in the config: its constructor gets every field of that."""
_NORMS = ("CROSSCODER", "SAE", "MIXED", "NONE", "DECOUPLED")
"""In the order of their ids, from 1."""
_TENSORS = words("encoder.weight encoder.bias decoder.weight decoder.bias")
_NORMALISERS = words("activation_mean activation_std activation_global_scale target_rms")
_BUFFERS = words("code_normalization_id k threshold") | _NORMALISERS
_SMALLEST_SCALE = 1e-8
"""Added to the scale where outputs are divided by it, but not where inputs are multiplied."""
USED = words(
    "activation_dim code_normalization code_normalization_alpha_cc code_normalization_alpha_sae dict_size "
    "encoder_layers k num_layers"
)
OF_TRAINING = words("init_with_transpose norm_init_scale same_init_for_all_layers target_rms")
_COMPILED = "_orig_mod."
"""Prefix of the names in a state dict that was saved while the module was compiled."""
_SAME = 1e-5
"""Relative spread within which thresholds times norms count as one threshold."""


def read(path: Path) -> Plain:
    """Read the folder, or a file of weights."""
    file = path / WEIGHTS if path.is_dir() else require(path)
    origin = file.with_name(CONFIG)
    config = read_json(origin) if origin.is_file() else {}
    state, hooks = _state(file)
    refuse_tensors(state, _TENSORS | _BUFFERS, file)
    encoder, decoder = take(state, "encoder.weight", file), take(state, "decoder.weight", file)
    if encoder.ndim != 3 or decoder.ndim != 3:
        shapes = f"{tuple(encoder.shape)} and {tuple(decoder.shape)}"
        raise IntegrityError(
            f"{file}: encoder.weight and decoder.weight",
            expected="[hooks, D, N] and [hooks, N, D]",
            got=shapes,
        )
    count, width, latents = encoder.shape
    if tuple(decoder.shape) != (count, latents, width):
        raise IntegrityError(
            f"{file}: decoder.weight", expected=(count, latents, width), got=tuple(decoder.shape)
        )
    for field, size in zip(("num_layers", "activation_dim", "dict_size"), encoder.shape, strict=True):
        require_size(origin, field, config.get(field), size)
    if config.get("encoder_layers") not in (None, list(range(count))):
        raise ConfigError(
            f"{origin}: encoder_layers",
            expected="null: every hook is read, in order",
            got=config["encoder_layers"],
        )
    b_out = take(state, "decoder.bias", file)
    if tuple(b_out.shape) != (count, width):
        raise IntegrityError(f"{file}: decoder.bias", expected=(count, width), got=tuple(b_out.shape))
    activation, threshold = _threshold(state, config, decoder, file)
    mean, into, back = _normaliser(state, (count, width), file)
    # Joined, as Winnow's rows are, and normalisation folded in; in double precision, since the mean may be
    # large against the codes.
    W_enc = encoder.double() * into[:, None]
    b_enc = take(state, "encoder.bias", file).double() - torch.einsum("hd,hdn->n", mean, W_enc)
    W_dec = decoder.double() * back[:, None]
    return Plain(
        activation=activation,
        W_enc=W_enc.permute(2, 0, 1).reshape(latents, -1),
        b_enc=b_enc,
        W_dec=W_dec.transpose(0, 1).reshape(latents, -1),
        b_in=torch.zeros(count * width),
        b_out=(b_out.double() * back + mean).flatten(),
        k=_k(state, config, origin),
        threshold=threshold,
        widths=(width,) * count,
        hook=hooks[0] if len(hooks) == count else None,
        with_hooks=hooks[1:] if len(hooks) == count else (),
        notes=unknown_fields(config, USED | OF_TRAINING, origin),
    )


def _state(file: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The tensors, and the hooks that our own exports name."""
    if kind_of_file(file) is not Kind.TORCH:
        state = read_safetensors(file)
        with safe_open(file, framework="pt") as opened:
            hooks = (opened.metadata() or {}).get(HOOKS, "")
        return state, tuple(filter(None, hooks.split(",")))
    return {str(name).removeprefix(_COMPILED): value for name, value in read_pt(file).items()}, ()


def _threshold(
    state: dict[str, Any], config: dict[str, Any], decoder: Tensor, file: Path
) -> tuple[Activation, Tensor | None]:
    """The activation and its threshold: one [], or one per latent [N] if the library scales codes."""
    if "threshold" not in state:
        return "relu", None
    threshold, name = take(state, "threshold", file), _norm_of(state, config, file)
    if name == "DECOUPLED" or threshold.ndim:
        raise ConfigError(
            f"{file}: code normalization DECOUPLED",
            expected="one code per latent",
            fix="It has a code for each hook, which Winnow's crosscoders have not",
        )
    # -1 is the library's initial value: training ended before the threshold was estimated.
    if threshold < 0:
        raise ConfigError(
            f"{file}: no threshold was estimated in training",
            fix="Train past its `threshold_start_step`: until then every positive latent is active there",
        )
    if name == "NONE":
        return "batchtopk", threshold
    # A latent without a decoder is never active there; its threshold must be finite here.
    norms = _norms(name, decoder, config)
    return "jumprelu", (threshold / norms).clamp_max(torch.finfo(torch.float32).max)


def _norm_of(state: dict[str, Any], config: dict[str, Any], file: Path) -> str:
    """The name of the norm that codes are multiplied by before they are compared with the threshold."""
    said, number = config.get("code_normalization"), state.get("code_normalization_id")
    name = None
    if number is not None:
        if not 1 <= int(number) <= len(_NORMS):
            raise ConfigError(f"{file}: code_normalization_id", expected="1 to 5", got=int(number))
        name = _NORMS[int(number) - 1]
    if said is not None and (str(said).upper() not in _NORMS or name not in (None, str(said).upper())):
        raise ConfigError(
            f"{file}: code_normalization of {CONFIG}",
            expected=f"{name}, as in the weights" if name else ", ".join(_NORMS),
            got=said,
        )
    # The library's own assumption for files from before it recorded one.
    return name or (str(said).upper() if said is not None else "CROSSCODER")


def _norms(name: str, decoder: Tensor, config: dict[str, Any]) -> Tensor:
    """The norm of each latent's rows [N] of a decoder [H, N, D]."""
    summed, joined = decoder.norm(dim=2).sum(0), decoder.norm(dim=(0, 2))
    if name == "MIXED":
        # The defaults of its constructor.
        sae = config.get("code_normalization_alpha_sae", 1.0)
        return joined * sae + summed * config.get("code_normalization_alpha_cc", 0.1)
    return {"CROSSCODER": summed, "SAE": joined}[name]


def _normaliser(state: dict[str, Any], shape: tuple[int, int], file: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [H, D], factor of inputs [H, 1] and factor of outputs [H, 1], in double precision."""
    one = torch.ones(shape[0], 1, dtype=torch.float64)
    if "activation_mean" not in state or "activation_std" not in state:
        return torch.zeros(shape, dtype=torch.float64), one, one
    mean, std = (take(state, f"activation_{name}", file).double() for name in ("mean", "std"))
    # NaN is the library's own sign of rows that are not normalised.
    if mean.isnan().any() or std.isnan().any():
        return torch.zeros(shape, dtype=torch.float64), one, one
    scale = take(state, "activation_global_scale", file).double()
    for name, tensor, expected in (("mean", mean, shape), ("global_scale", scale, shape[:1])):
        if tuple(tensor.shape) != expected:
            raise IntegrityError(f"{file}: activation_{name}", expected=expected, got=tuple(tensor.shape))
    return mean, scale[:, None], 1 / (scale[:, None] + _SMALLEST_SCALE)


def _k(state: dict[str, Any], config: dict[str, Any], origin: Path) -> int | None:
    k = state.get("k", config.get("k"))
    if k is not None and "k" in state:
        require_size(origin, "k", config.get("k"), int(k))
    return None if k is None else int(k)


def write(plain: Plain, folder: Path) -> None:
    """Write `config.json` and `model.safetensors`, for `from_pretrained(DIR, from_hub=True)`."""
    if not plain.widths:
        raise refuse(NAME, "an SAE of one hook", "Export to dictionary_learning")
    if len(set(plain.widths)) > 1:
        raise refuse(NAME, f"hooks of several widths, {plain.widths}", "Train on hooks of one width")
    if plain.activation == "topk":
        raise refuse(NAME, "TopK: it has one threshold", "Train with `activation: batchtopk`")
    if plain.epsilon is not None:
        raise refuse(
            NAME,
            "a crosscoder of layer-normed rows: it reads raw ones",
            "Each row has its own mean and norm, which weights cannot express",
        )
    count, width, latents = len(plain.widths), plain.widths[0], len(plain.b_enc)
    # The format subtracts nothing from its input, so the input's bias is folded into `b_enc`.
    plain = plain.taking(torch.zeros_like(plain.b_in)).single()
    decoder = plain.W_dec.view(latents, count, width).transpose(0, 1).contiguous()
    norm, threshold = _one_threshold(plain, decoder)
    state = {
        "encoder.weight": plain.W_enc.view(latents, count, width).permute(1, 2, 0).contiguous(),
        "encoder.bias": plain.b_enc,
        "decoder.weight": decoder,
        "decoder.bias": plain.b_out.view(count, width),
        "code_normalization_id": torch.tensor(_NORMS.index(norm) + 1),
        "target_rms": torch.tensor(1.0),
        "activation_mean": torch.full((count, width), torch.nan),
        "activation_std": torch.full((count, width), torch.nan),
        "activation_global_scale": torch.ones(count),
    }
    config: dict[str, Any] = {"activation_dim": width, "dict_size": latents, "num_layers": count}
    config["code_normalization"] = norm
    if threshold is not None:
        state |= {"k": torch.tensor(plain.k, dtype=torch.int), "threshold": threshold}
        config["k"] = plain.k
    hooks = (plain.hook, *plain.with_hooks) if plain.hook else ()
    write_safetensors(state, folder / WEIGHTS, {HOOKS: ",".join(hooks)} if hooks else None)
    write_json(folder / CONFIG, config)


def _one_threshold(plain: Plain, decoder: Tensor) -> tuple[str, Tensor | None]:
    """The norm and the one threshold [] that give each latent its own; ("NONE", None) with `relu`.

    Raises:
        ConfigError: No norm does.
    """
    if plain.activation == "relu":
        return "NONE", None
    for name in ("NONE", "CROSSCODER", "SAE"):
        norms = torch.ones(len(plain.b_enc)) if name == "NONE" else _norms(name, decoder, {})
        scaled = plain.thresholds * norms
        if scaled.max() - scaled.min() <= _SAME * scaled.max():
            return name, scaled.mean()
    raise refuse(NAME, "a threshold for each latent: it has one", "Train with `activation: batchtopk`")
