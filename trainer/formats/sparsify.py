"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors` of a folder called after its module.

`encoder.weight` [N, D], `encoder.bias` [N], `W_dec` [N, D], `b_dec` [D], `W_skip` [D, D] where there is one.
TopK after ReLU, on raw rows; `b_dec` is taken from an SAE's input, not from a transcoder's.
"""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch

from schemas.errors import ConfigError, IntegrityError
from trainer.formats.files import folder_of, read_json, read_safetensors, refuse, take, write_json
from trainer.formats.names import from_module
from trainer.formats.plain import Plain

NAME = "sparsify"
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def read(path: Path) -> Plain:
    """The folder of one module."""
    path = folder_of(path)
    config, tensors = read_json(path / CONFIG), read_safetensors(path / WEIGHTS)
    activation = config.get("activation", "topk")
    if activation != "topk" or config.get("signed"):
        got = "signed" if config.get("signed") else activation
        raise ConfigError(f"{path / CONFIG}: activation", expected="topk, unsigned", got=got)
    if not isinstance(config.get("k"), int):
        raise IntegrityError(f"{path / CONFIG}: k", expected="a number", got=config.get("k"))
    file, transcode, skip = path / WEIGHTS, bool(config.get("transcode")), bool(config.get("skip_connection"))
    W_enc, b_dec = take(tensors, "encoder.weight", file), take(tensors, "b_dec", file)
    reads, gives = from_module(path.resolve().name)
    return Plain(
        activation="topk",
        W_enc=W_enc,
        b_enc=take(tensors, "encoder.bias", file),
        W_dec=take(tensors, "W_dec", file),
        b_in=torch.zeros(W_enc.shape[1]) if transcode else b_dec,
        b_out=b_dec,
        k=config["k"],
        W_skip=take(tensors, "W_skip", file) if skip else None,
        transcoder=transcode or skip,
        hook=reads if transcode else gives,
        target_hook=gives if transcode or skip else None,
    )


def write(plain: Plain, folder: Path) -> None:
    """`cfg.json` and `sae.safetensors`, for `SparseCoder.load_from_disk`."""
    if plain.activation != "topk":
        raise refuse(NAME, f"activation {plain.activation!r}", "Export to saelens or dictionary_learning")
    if plain.epsilon is not None:
        raise refuse(
            NAME,
            "an SAE of layer-normed rows: it reads raw ones",
            "Each row has its own mean and norm, which weights cannot hold. Export to openai or saelens",
        )
    if plain.W_dec.shape[1] != plain.W_enc.shape[1]:
        raise refuse(NAME, "a transcoder between hooks of two widths", "Export to another format")
    plain = plain.taking(torch.zeros_like(plain.b_in) if plain.transcoder else plain.b_out).single()
    tensors = {
        "encoder.weight": plain.W_enc,
        "encoder.bias": plain.b_enc,
        "W_dec": plain.W_dec,
        "b_dec": plain.b_out,
    }
    if plain.W_skip is not None:
        tensors["W_skip"] = plain.W_skip
    latents, width = plain.W_enc.shape
    config = {
        "activation": "topk",
        "expansion_factor": max(1, latents // width),
        "normalize_decoder": not plain.transcoder,
        "num_latents": latents,
        "k": plain.k,
        "multi_topk": False,
        "skip_connection": plain.W_skip is not None,
        "transcode": plain.transcoder,
        "d_in": width,
    }
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    write_json(folder / CONFIG, config)
