"""Gemma Scope 2's crosscoders: residual streams of several layers, JumpReLU on raw rows.

Legend: H hooks, D width of each, M latents of a file, N = H M.

A folder such as `layer_7_13_17_22_width_262k_l0_medium` with a file `params_layer_{i}.safetensors` for the
i-th *hook* (not layer), of w_enc [D, M], b_enc [M], threshold [M], w_dec [M, H, D] and b_dec [D]. A file's
latents read its own hook's rows alone and write to all hooks; that they write nothing to earlier ones is in
the weights. `b_dec` is not subtracted from the input. The hooks are in `config.json`
(`model.layers.{7,13,17,22}.output`) and in the folder's name.

In Winnow it is a crosscoder whose encoder is 0 outside each latent's own hook.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from winnow.sae.formats.fields import refuse_tensors, require_size, unknown_fields, words
from winnow.sae.formats.files import read_json, read_safetensors, take, take_matrix
from winnow.sae.formats.plain import Plain
from winnow.schemas.errors import ConfigError, IntegrityError

FIRST, CONFIG = "params_layer_0.safetensors", "config.json"
# Fields of all of Gemma Scope 2's configs, of which `l0` is the aim of training.
FIELDS = words("affine_connection architecture hf_hook_point_in hf_hook_point_out model_name type width l0")
_FILE = re.compile(r"params_layer_(\d+)\.safetensors")
_TENSORS = {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"}
_POINT = re.compile(r"(?:.*\.)?layers\.\{(\d+(?:,\d+)+)\}\.output")
_FOLDER = re.compile(r"layer_(\d+(?:_\d+)+)_width_.*")
_WIDE = 3
"""Axes of the decoder of a file that is part of a crosscoder."""


def read(path: Path) -> Plain:
    """Read the folder."""
    origin = path / CONFIG
    config = read_json(origin) if origin.is_file() else {}
    for field, expected in (("type", "crosscoder"), ("architecture", "jump_relu")):
        if (said := config.get(field, expected)) != expected:
            fix = "Import cross-layer transcoders --from gemma-scope-2" if said == "clt" else None
            raise ConfigError(f"{origin}: {field}", expected=expected, got=said, fix=fix)
    layers = _layers(path, config)
    files = [path / f"params_layer_{hook}.safetensors" for hook in range(len(layers))]
    found = sorted(file.name for file in path.iterdir() if _FILE.fullmatch(file.name))
    if found != sorted(file.name for file in files):
        raise ConfigError(
            f"the files in {path}", expected=f"one of each of the layers {layers}", got=", ".join(found)
        )
    parts = [_read(file, len(layers)) for file in files]
    width = parts[0]["b_dec"].shape[-1]
    blocks = [torch.zeros(len(part["b_enc"]), len(layers), width) for part in parts]
    for hook, (block, part, file) in enumerate(zip(blocks, parts, files, strict=True)):
        if part["w_enc"].T.shape != block[:, hook].shape:
            raise IntegrityError(
                f"{file}: w_enc", expected=(width, len(block)), got=tuple(part["w_enc"].shape)
            )
        if part["w_dec"].shape != block.shape:
            raise IntegrityError(
                f"{file}: w_dec", expected=tuple(block.shape), got=tuple(part["w_dec"].shape)
            )
        block[:, hook] = part["w_enc"].T
    W_enc = torch.cat(blocks).flatten(1)
    require_size(origin, "width", config.get("width"), len(W_enc))
    return Plain(
        activation="jumprelu",
        W_enc=W_enc,
        b_enc=torch.cat([part["b_enc"] for part in parts]),
        W_dec=torch.cat([part["w_dec"] for part in parts]).flatten(1),
        b_in=torch.zeros(W_enc.shape[1]),
        b_out=torch.cat([part["b_dec"] for part in parts]),
        threshold=torch.cat([part["threshold"] for part in parts]),
        widths=(width,) * len(layers),
        hook=f"resid_post.{layers[0]}",
        with_hooks=tuple(f"resid_post.{layer}" for layer in layers[1:]),
        model=config.get("model_name"),
        notes=unknown_fields(config, FIELDS, origin),
    )


def _layers(path: Path, config: dict[str, Any]) -> list[int]:
    """The layers whose streams it reads, from the config, otherwise from the folder's name."""
    points = {str(config[name]) for name in ("hf_hook_point_in", "hf_hook_point_out") if config.get(name)}
    if points:
        match = _POINT.fullmatch(min(points))
        if match is None or len(points) > 1:
            raise ConfigError(
                f"{path / CONFIG}: hf_hook_point_in and hf_hook_point_out",
                expected="model.layers.{7,13,...}.output, the same in both",
                got=", ".join(sorted(points)),
            )
        return [int(layer) for layer in match[1].split(",")]
    if match := _FOLDER.fullmatch(path.resolve().name):
        return [int(layer) for layer in match[1].split("_")]
    raise ConfigError(
        f"{path} does not say which layers it reads",
        expected="a config.json with hf_hook_point_in, or a folder layer_7_13_..._width_...",
    )


def _read(file: Path, hooks: int) -> dict[str, torch.Tensor]:
    tensors = read_safetensors(file)
    refuse_tensors(tensors, _TENSORS, file)
    found = {name: take(tensors, name, file) for name in _TENSORS}
    take_matrix(tensors, "w_enc", file)
    if found["w_dec"].ndim != _WIDE:
        expected = f"[latents, {hooks} hooks, D]"
        raise IntegrityError(f"{file}: w_dec", expected=expected, got=tuple(found["w_dec"].shape))
    for name in ("b_enc", "b_dec", "threshold"):
        if found[name].ndim != 1:
            raise IntegrityError(f"{file}: {name}", expected="one axis", got=tuple(found[name].shape))
    return found
