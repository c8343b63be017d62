"""dictionary_learning's `ae.pt` (a state dict) and `config.json` (`trainer`: class, sizes, layer, model).

| class | `b_dec` (or `bias`) taken from the input | activation |
|---|---|---|
| AutoEncoderTopK | yes | `k` best |
| BatchTopKSAE, MatryoshkaBatchTopKSAE | yes | above one `threshold` |
| AutoEncoder | yes | ReLU |
| AutoEncoderNew | no | ReLU |
| JumpReluAutoEncoder | no | above each latent's `threshold` |

All on raw rows. `nn.Linear` holds a decoder as [D, N].
"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from schemas.errors import ConfigError, IntegrityError
from trainer.formats.files import folder_of, read_json, read_pt, refuse, take, write_json
from trainer.formats.names import from_lens, layer_of
from trainer.formats.plain import Plain

NAME = "dictionary_learning"
WEIGHTS, CONFIG = "ae.pt", "config.json"
LINEAR = {
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu",
}
MATRICES = {"MatryoshkaBatchTopKSAE": "batchtopk", "JumpReluAutoEncoder": "jumprelu"}
WRITTEN = {
    "topk": ("AutoEncoderTopK", "TopKTrainer"),
    "batchtopk": ("BatchTopKSAE", "BatchTopKTrainer"),
    "relu": ("AutoEncoder", "StandardTrainer"),
    "jumprelu": ("JumpReluAutoEncoder", "JumpReluTrainer"),
}


def read(path: Path) -> Plain:
    """The folder that holds both files."""
    path = folder_of(path)
    trainer = read_json(path / CONFIG).get("trainer", {})
    name, file = trainer.get("dict_class"), path / WEIGHTS
    known = LINEAR | MATRICES
    if name not in known:
        raise ConfigError(f"{path / CONFIG}: dict_class", expected=", ".join(known), got=name)
    state, activation = read_pt(file), known[name]
    threshold = take(state, "threshold", file) if activation in ("batchtopk", "jumprelu") else None
    if activation == "batchtopk" and threshold is not None and threshold < 0:
        raise ConfigError(
            f"{file}: no threshold was kept while it was trained",
            fix="Train past its `threshold_start_step`: without one the library cannot encode either",
        )
    W_enc, b_enc, W_dec, b_dec = _linear(state, file) if name in LINEAR else _matrices(state, file)
    taken = name not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    k = trainer.get("k", state.get("k"))
    k = int(k) if k is not None else None
    if activation == "topk" and k is None:
        raise IntegrityError(f"{path / CONFIG}: trainer.k", expected="a number")
    sizes = state.get("group_sizes")
    return Plain(
        activation=activation,  # pyright: ignore[reportArgumentType]
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_in=b_dec if taken else torch.zeros_like(b_dec),
        b_out=b_dec,
        k=k,
        threshold=threshold,
        matryoshka=tuple(accumulate(sizes.tolist())) if isinstance(sizes, Tensor) else (),
        hook=_hook(trainer),
        model=trainer.get("lm_name"),
    )


def _linear(state: dict[str, Any], file: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias = next((name for name in ("b_dec", "bias", "decoder.bias") if name in state), "b_dec")
    return (
        take(state, "encoder.weight", file),
        take(state, "encoder.bias", file),
        take(state, "decoder.weight", file).T,
        take(state, bias, file),
    )


def _matrices(state: dict[str, Any], file: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        take(state, "W_enc", file).T,
        take(state, "b_enc", file),
        take(state, "W_dec", file),
        take(state, "b_dec", file),
    )


def _hook(trainer: dict[str, Any]) -> str | None:
    """From `submodule_name`, such as `resid_post_layer_8`."""
    layer, name = trainer.get("layer"), str(trainer.get("submodule_name") or "")
    part = name.removesuffix(f"_layer_{layer}")
    return from_lens(f"{part}.{layer}") if part and isinstance(layer, int) else None


def write(plain: Plain, folder: Path) -> None:
    """`ae.pt` and `config.json`, for `dictionary_learning.utils.load_dictionary`."""
    if plain.transcoder:
        raise refuse(NAME, "a transcoder", "Export to sparsify or saelens")
    if plain.epsilon is not None:
        raise refuse(
            NAME,
            "an SAE of layer-normed rows: it reads raw ones",
            "Each row has its own mean and norm, which weights cannot hold. Export to openai or saelens",
        )
    dict_class, trainer_class = WRITTEN[plain.activation]
    jump = plain.activation == "jumprelu"
    plain = plain.taking(torch.zeros_like(plain.b_in) if jump else plain.b_out).single()
    if jump:
        state = {"W_enc": plain.W_enc.T.contiguous(), "b_enc": plain.b_enc, "W_dec": plain.W_dec}
        state |= {"b_dec": plain.b_out, "threshold": plain.thresholds}
    else:
        state = {"encoder.weight": plain.W_enc, "encoder.bias": plain.b_enc}
        state |= {"decoder.weight": plain.W_dec.T.contiguous()}
        state["bias" if plain.activation == "relu" else "b_dec"] = plain.b_out
        if plain.activation != "relu":
            unset = torch.tensor(-1.0)
            state |= {"k": torch.tensor(plain.k, dtype=torch.int)}
            state |= {"threshold": unset if plain.threshold is None else plain.threshold}
    latents, width = plain.W_enc.shape
    layer = layer_of(plain.hook)
    trainer = {
        "trainer_class": trainer_class,
        "dict_class": dict_class,
        "activation_dim": width,
        "dict_size": latents,
        "k": plain.k,
        "layer": layer,
        "lm_name": plain.model,
        "submodule_name": f"{plain.hook.partition('.')[0]}_layer_{layer}"
        if plain.hook and layer is not None
        else None,
        "device": "cpu",
    }
    torch.save(state, folder / WEIGHTS)
    write_json(folder / CONFIG, {"trainer": trainer})
