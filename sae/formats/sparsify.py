"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors` of a folder named after its module.

`encoder.weight` [N, D], `encoder.bias` [N], `W_dec` [N, D], `b_dec` [D], and possibly `W_skip` [D, D]. TopK
after ReLU, on raw rows; `b_dec` is subtracted from an SAE's input, not from a transcoder's. It hooks modules
of the base model: an SAE reads a module's own output, a transcoder its input and output. If a family norms
that output before it adds it (Gemma 2 and 3, OLMo 2 and 3), Winnow's `attn_out` and `mlp_out` are the norm's.
"""

from __future__ import annotations

from pathlib import Path

import torch

from winnow.sae.formats.fields import refuse_tensors, require_size, unknown_fields, words
from winnow.sae.formats.files import (
    folder_of,
    read_json,
    read_safetensors,
    refuse,
    take,
    write_json,
    write_safetensors,
)
from winnow.sae.formats.names import added_note, from_module, module_path
from winnow.sae.formats.plain import Plain
from winnow.schemas.errors import ConfigError, IntegrityError

NAME = "sparsify"
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
USED = words("activation d_in expansion_factor k multi_topk num_latents signed skip_connection transcode")
OF_TRAINING = words("normalize_decoder")
_TENSORS = {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}


def read(path: Path) -> Plain:
    """Read the folder of one module."""
    path = folder_of(path)
    config, tensors = read_json(path / CONFIG), read_safetensors(path / WEIGHTS)
    activation = config.get("activation", "topk")
    if activation != "topk" or config.get("signed"):
        got = "signed" if config.get("signed") else activation
        raise ConfigError(f"{path / CONFIG}: activation", expected="topk, unsigned", got=got)
    if not isinstance(config.get("k"), int):
        raise IntegrityError(f"{path / CONFIG}: k", expected="a number", got=config.get("k"))
    file, transcode, skip = path / WEIGHTS, bool(config.get("transcode")), bool(config.get("skip_connection"))
    refuse_tensors(tensors, _TENSORS | ({"W_skip"} if skip else set()), file)
    W_enc, b_dec = take(tensors, "encoder.weight", file), take(tensors, "b_dec", file)
    # 0 latents in the config means `expansion_factor` times the width.
    for name, size in zip(("num_latents", "d_in"), W_enc.shape, strict=True):
        require_size(path / CONFIG, name, config.get(name) or None, size)
    if not config.get("num_latents") and config.get("expansion_factor"):
        require_size(
            path / CONFIG, "expansion_factor", config["expansion_factor"] * W_enc.shape[1], len(W_enc)
        )
    # Resolved: the path may be `.`, and the folder's name is all that says where the SAE reads.
    name = path.resolve().name
    reads, gives = from_module(name)
    notes = unknown_fields(config, USED | OF_TRAINING, path / CONFIG)
    # findings/sparsify_multi_topk_forward.sh
    if config.get("multi_topk"):
        notes += (
            f"sparsify's forward pass reconstructs from {4 * config['k']} latents, without a skip "
            f"(multi_topk); its encode takes {config['k']}, as Winnow does",
        )
    # Winnow reads modules' outputs only; the input of this one is the output of some other.
    if transcode and gives and not reads:
        notes += (
            f"it reads the input of {module_path(name)}: --hook names the module whose output that is, "
            "often the norm before it",
        )
    return Plain(
        activation="topk",
        W_enc=W_enc,
        b_enc=take(tensors, "encoder.bias", file),
        W_dec=take(tensors, "W_dec", file),
        b_in=torch.zeros(W_enc.shape[1]) if transcode else b_dec,
        b_out=b_dec,
        k=config["k"],
        W_skip=take(tensors, "W_skip", file) if skip else None,
        # Winnow has skips on transcoders only; an SAE with one is a transcoder to its own hook.
        transcoder=transcode or skip,
        hook=reads if transcode else gives,
        target_hook=gives if transcode or skip else None,
        notes=(*notes, *added_note(gives)),
    )


def write(plain: Plain, folder: Path) -> None:
    """Write `cfg.json` and `sae.safetensors`, for `SparseCoder.load_from_disk`."""
    if plain.activation != "topk":
        raise refuse(NAME, f"activation {plain.activation!r}", "Export to saelens or dictionary_learning")
    if plain.epsilon is not None:
        raise refuse(
            NAME,
            "an SAE of layer-normed rows: it reads raw ones",
            "Each row has its own mean and norm, which weights cannot express. Export to openai or saelens",
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
        # Ignored by the library beside `num_latents`, but a field that its config must have.
        "expansion_factor": max(1, latents // width),
        "normalize_decoder": not plain.transcoder,
        "num_latents": latents,
        "k": plain.k,
        "multi_topk": False,
        "skip_connection": plain.W_skip is not None,
        "transcode": plain.transcoder,
        "d_in": width,
    }
    write_safetensors(tensors, folder / WEIGHTS)
    write_json(folder / CONFIG, config)
