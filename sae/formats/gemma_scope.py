"""Gemma Scope's `params.npz` and Gemma Scope 2's `params.safetensors`: JumpReLU on raw rows.

`W_enc` [D, N], `b_enc` [N], `threshold` [N], `W_dec` [N, O], `b_dec` [O]; `b_dec` is *not* subtracted from
the input. In Gemma Scope 2 the first letters are lower-case, a transcoder may have `affine_skip_connection`
[D, O], and a `config.json` beside the file names the hook. In Gemma Scope 1 the folder's name does. A
transcoder has the same arrays; if O = D and no name says so, only the user knows which of the two it is.

| | reads | |
|---|---|---|
| res, `resid_post` | a block's output | `resid_post.L` |
| mlp, `mlp_out` | the MLP's output after its norm | `mlp_out.L` |
| att, `attn_out` | the input of `o_proj`: all heads, joined | `attn_z.L` |
| transcoders (first) | the MLP's input after its norm and before that norm's gain | no hook of Winnow's |
| `transcoder` (2) | `pre_feedforward_layernorm`'s output | that module |

Gemma Scope 2's crosscoders are folders of several files: `gemma_scope_cross`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from winnow.sae.formats import gemma_scope_cross
from winnow.sae.formats.fields import refuse_tensors, require_size, unknown_fields
from winnow.sae.formats.files import read_json, read_npz, read_safetensors, refuse, take
from winnow.sae.formats.names import HOOK
from winnow.sae.formats.plain import Plain
from winnow.schemas.errors import ConfigError, IntegrityError

NAME = "gemma-scope"
FILE, SECOND_FILE, CONFIG = "params.npz", "params.safetensors", "config.json"
_ARRAYS = {"W_enc", "b_enc", "threshold", "W_dec", "b_dec"}
_SKIP = "affine_skip_connection"
SITES = {
    "res": "resid_post", "mlp": "mlp_out", "att": "attn_z",
    "resid_post": "resid_post", "mlp_out": "mlp_out", "attn_out": "attn_z",
}  # fmt: skip
# Names of the published repositories and their folders: the files of Gemma Scope 1 themselves name no hook.
_FIRST_PATH = re.compile(r"gemma-scope-[^/]*-(res|mlp|att|transcoders)/layer_(\d+)/")
_SECOND_PATH = re.compile(r"/(resid_post|mlp_out|attn_out|transcoder)(?:_all)?/layer_(\d+)_")
_POINT = re.compile(r"(.*layers\.(\d+)(?:\.(\w+(?:\.\w+)*))?)\.(input|output)")
_NORMED_NOTE = (
    "it reads the input of layer {}'s MLP after the norm and before the norm's gain, which is no hook that "
    "Winnow reads"
)


def read(path: Path, *, transcoder: bool = False) -> Plain:
    """Read the file, or the folder that holds it."""
    if path.is_dir() and (path / gemma_scope_cross.FIRST).is_file():
        return gemma_scope_cross.read(path)
    if path.is_dir():
        second = (path / SECOND_FILE).is_file() and not (path / FILE).is_file()
        path = path / (SECOND_FILE if second else FILE)
    read_arrays = read_safetensors if path.suffix == ".safetensors" else read_npz
    # `w_enc` and `w_dec` of Gemma Scope 2 get the capitals of the first.
    arrays = {re.sub(r"^w_", "W_", name): array for name, array in read_arrays(path).items()}
    refuse_tensors(arrays, _ARRAYS | {_SKIP}, path)
    W_enc, W_dec = take(arrays, "W_enc", path).T, take(arrays, "W_dec", path)
    # A cross-layer transcoder decodes to several layers at once: [N, layers, O].
    if W_dec.ndim != 2:
        raise ConfigError(
            f"{path}: W_dec", expected="a matrix", got=f"{W_dec.ndim} axes: a cross-layer transcoder"
        )
    origin = path.with_name(CONFIG)
    config = read_json(origin) if path.suffix == ".safetensors" and origin.is_file() else {}
    if (architecture := config.get("architecture", "jump_relu")) != "jump_relu":
        raise ConfigError(f"{origin}: architecture", expected="jump_relu", got=architecture)
    require_size(origin, "width", config.get("width"), len(W_enc))
    # Without its skip the transcoder would run, and give other numbers.
    if config.get("affine_connection") and _SKIP not in arrays:
        raise IntegrityError(f"{origin}: affine_connection", expected=f"a tensor {_SKIP} in {path.name}")
    hook, target, across, notes = _place(path, config)
    return Plain(
        activation="jumprelu",
        W_enc=W_enc,
        b_enc=take(arrays, "b_enc", path),
        W_dec=W_dec,
        b_in=torch.zeros(W_enc.shape[1]),
        b_out=take(arrays, "b_dec", path),
        threshold=take(arrays, "threshold", path),
        W_skip=take(arrays, _SKIP, path).T if _SKIP in arrays else None,
        transcoder=transcoder or across or _SKIP in arrays or W_dec.shape[1] != W_enc.shape[1],
        hook=hook,
        target_hook=target,
        model=config.get("model_name"),
        notes=(*notes, *unknown_fields(config, gemma_scope_cross.FIELDS, origin)),
    )


def _place(path: Path, config: dict[str, Any]) -> tuple[str | None, str | None, bool, tuple[str, ...]]:
    """Hook, target, whether it is a transcoder, and notes: from the config, or from the folders' names."""
    if "hf_hook_point_in" in config:
        points = config["hf_hook_point_in"], config.get("hf_hook_point_out")
        across = points[1] not in (None, points[0])
        hook, notes = _point(points[0])
        target, more = _point(points[1]) if across else (None, ())
        return hook, target, across, (*notes, *more)
    match = _FIRST_PATH.search(path.resolve().as_posix()) or _SECOND_PATH.search(path.resolve().as_posix())
    if not match:
        return None, None, False, ()
    kind, layer = match.groups()
    if kind in SITES:
        return f"{SITES[kind]}.{layer}", None, False, ()
    # The target is a hook of Winnow's even if the input is none: it is imported with a note, for `--hook`.
    if kind == "transcoders":
        return None, f"mlp_out.{layer}", True, (_NORMED_NOTE.format(layer),)
    return f"model.layers.{layer}.pre_feedforward_layernorm", f"mlp_out.{layer}", True, ()


def _point(name: object) -> tuple[str | None, tuple[str, ...]]:
    """A place such as `model.layers.9.output` as a hook, or a note on one that Winnow does not read."""
    match = _POINT.fullmatch(str(name))
    if match:
        path, layer, module, side = match.groups()
        if not module:
            return f"resid_{'post' if side == 'output' else 'pre'}.{layer}", ()
        # What Gemma adds to the stream is the norm's output, which is Winnow's `mlp_out`.
        if side == "output" and module == "post_feedforward_layernorm":
            return f"mlp_out.{layer}", ()
        if side == "output" and HOOK.fullmatch(path):
            return path, ()
        if side == "input" and module == "self_attn.o_proj":
            return f"attn_z.{layer}", ()
    return None, (f"it reads {name}, which is no hook that Winnow reads",)


def write(plain: Plain, folder: Path) -> None:
    """Write `params.npz`."""
    if plain.activation == "topk":
        raise refuse(NAME, "TopK, which has no threshold", "Export to saelens, sparsify or openai")
    if plain.epsilon is not None:
        raise refuse(
            NAME,
            "an SAE of layer-normed rows: it reads raw ones",
            "Each row has its own mean and norm, which weights cannot express. Export to saelens",
        )
    if plain.W_skip is not None:
        raise refuse(NAME, "a skip connection", "Export to saelens")
    # The format subtracts nothing from its input, so the input's bias is folded into `b_enc`.
    plain = plain.taking(torch.zeros_like(plain.b_in)).single()
    arrays = {
        "W_enc": plain.W_enc.T.contiguous(),
        "b_enc": plain.b_enc,
        "threshold": plain.thresholds,
        "W_dec": plain.W_dec,
        "b_dec": plain.b_out,
    }
    np.savez(folder / FILE, **{name: tensor.numpy() for name, tensor in arrays.items()})  # pyright: ignore[reportArgumentType]
