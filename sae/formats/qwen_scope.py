"""Qwen-Scope's `layer{L}.sae.pt`: TopK on raw rows of the residual stream after a block.

`W_enc` [N, D], `b_enc` [N], `W_dec` [D, N], `b_dec` [D] and nothing else; `b_dec` is *not* subtracted from
the input. K is not in the file: `config.json` beside it says it for all layers, and the published folders
carry it in their names (`SAE-Res-Qwen3-1.7B-Base-W32K-L0_50`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from winnow.sae.formats.fields import refuse_tensors, require_size, unknown_fields, words
from winnow.sae.formats.files import read_json, read_pt, refuse, take, take_matrix, write_json
from winnow.sae.formats.names import OURS
from winnow.sae.formats.plain import Plain
from winnow.schemas.errors import ConfigError

NAME = "qwen-scope"
CONFIG = "config.json"
FILE = re.compile(r"layer(\d+)\.sae\.pt")
_FOLDER = re.compile(r"SAE-Res-.+-W\d+K-L0_(\d+)")
_TENSORS = {"W_enc", "b_enc", "W_dec", "b_dec"}
_SITE = "resid_post"
USED = words("base_model d_model d_sae hook_point k model_type")
OF_TRAINING = words("dtype num_layers")
SHOWN = 3
_NEGATIVE_NOTE = (
    "the code on its page keeps a negative value that is among the K largest, SAELens does not; here such a "
    "latent is inactive"
)


def read(path: Path) -> Plain:
    """Read one layer's file, or the folder that holds it alone."""
    file = _file(path)
    origin = file.with_name(CONFIG)
    config = read_json(origin) if origin.is_file() else {}
    for field, expected in (("model_type", "topk_sae"), ("hook_point", _SITE)):
        if config.get(field, expected) != expected:
            raise ConfigError(f"{origin}: {field}", expected=expected, got=config[field])
    state = read_pt(file)
    refuse_tensors(state, _TENSORS, file)
    W_enc, b_dec = take_matrix(state, "W_enc", file), take(state, "b_dec", file)
    for field, size in zip(("d_sae", "d_model"), W_enc.shape, strict=True):
        require_size(origin, field, config.get(field), size)
    layer = FILE.fullmatch(file.name)
    return Plain(
        activation="topk",
        W_enc=W_enc,
        b_enc=take(state, "b_enc", file),
        W_dec=take_matrix(state, "W_dec", file).T,
        b_in=torch.zeros(W_enc.shape[1]),
        b_out=b_dec,
        k=_k(file, config),
        hook=f"{_SITE}.{layer[1]}" if layer else None,
        model=config.get("base_model"),
        notes=(_NEGATIVE_NOTE, *unknown_fields(config, USED | OF_TRAINING, origin)),
    )


def _file(path: Path) -> Path:
    """The file, or the only one of a folder."""
    if not path.is_dir():
        return path
    found = sorted((file for file in path.iterdir() if FILE.fullmatch(file.name)), key=lambda file: file.name)
    if len(found) != 1:
        raise ConfigError(
            f"{path} holds {len(found)} files layer...sae.pt",
            expected="one",
            got=", ".join(file.name for file in found[:SHOWN]) or None,
            fix=f"Import a layer at a time, such as {found[0]}" if found else None,
        )
    return found[0]


def _k(file: Path, config: dict[str, Any]) -> int:
    """K of the config, or of the folder's name; both if there are both."""
    # Resolved: the path may be a bare file name.
    name = _FOLDER.search(file.resolve().parent.name)
    said = config.get("k"), int(name[1]) if name else None
    found = {k for k in said if k is not None}
    if len(found) == 1 and isinstance(k := found.pop(), int) and k > 0:
        return k
    raise ConfigError(
        f"the number of active latents of {file}",
        expected=f"k in {CONFIG} beside it, or a folder named ...-L0_K, and the same number in both",
        got=", ".join(repr(k) for k in said if k is not None) or "neither",
        fix=f'Write {{"k": 50}} to {file.with_name(CONFIG)}, with the number on the page that it is from',
    )


def write(plain: Plain, folder: Path) -> None:
    """Write `layer{L}.sae.pt` and `config.json`."""
    if plain.activation != "topk":
        raise refuse(NAME, f"activation {plain.activation!r}: it has TopK only", "Export to saelens")
    if plain.transcoder:
        raise refuse(NAME, "a transcoder", "Export to sparsify")
    if plain.epsilon is not None:
        raise refuse(
            NAME,
            "an SAE of layer-normed rows: it reads raw ones",
            "Each row has its own mean and norm, which weights cannot express. Export to openai or saelens",
        )
    match = OURS.fullmatch(plain.hook or "")
    if match is None or match[1] != _SITE:
        raise refuse(NAME, f"the hook {plain.hook}: it has {_SITE} only", "Export to saelens or sparsify")
    # The format subtracts nothing from its input, so the input's bias is folded into `b_enc`.
    plain = plain.taking(torch.zeros_like(plain.b_in)).single()
    state = {"W_enc": plain.W_enc, "b_enc": plain.b_enc}
    state |= {"W_dec": plain.W_dec.T.contiguous(), "b_dec": plain.b_out}
    latents, width = plain.W_enc.shape
    config = {"model_type": "topk_sae", "base_model": plain.model, "d_model": width, "d_sae": latents}
    config |= {"k": plain.k, "hook_point": _SITE, "dtype": "float32"}
    torch.save(state, folder / f"layer{match[2]}.sae.pt")
    write_json(folder / CONFIG, config)
