"""dictionary_learning's `ae.pt` (a state dict) and `config.json` (`trainer`: class, sizes, layer, model).

| class | `b_dec` (or `bias`) subtracted from the input | activation |
|---|---|---|
| AutoEncoderTopK | yes | `k` best |
| BatchTopKSAE, MatryoshkaBatchTopKSAE | yes | above one `threshold` |
| AutoEncoder | yes | ReLU |
| AutoEncoderNew | no | ReLU |
| JumpReluAutoEncoder | no | above each latent's `threshold` |
| GatedAutoEncoder | yes (`decoder_bias`) | ReLU where a gate is above 0: a JumpReLU here |

All read raw rows. `nn.Linear` holds a decoder as [D, N]. `submodule_name` is free text: except for the
residual stream, only its author knows what it stands for.
"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from winnow.sae.formats.fields import refuse_tensors, require_size, unknown_fields, words
from winnow.sae.formats.files import folder_of, read_json, read_pt, refuse, take, write_json
from winnow.sae.formats.gated import as_jumprelu
from winnow.sae.formats.names import HOOK, added_note, layer_of, module_path
from winnow.sae.formats.plain import Plain
from winnow.schemas.errors import ConfigError, IntegrityError

NAME = "dictionary_learning"
WEIGHTS, CONFIG = "ae.pt", "config.json"
_LINEAR = {
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu",
    "GatedAutoEncoder": "jumprelu",
}
_MATRICES = {"MatryoshkaBatchTopKSAE": "batchtopk", "JumpReluAutoEncoder": "jumprelu"}
# Per class, what its state dict holds beside the matrices: a tensor of no class is refused, not ignored.
_WEIGHTS_OF = {
    "AutoEncoderTopK": {"encoder.bias", "b_dec", "k", "threshold"},
    "BatchTopKSAE": {"encoder.bias", "b_dec", "k", "threshold"},
    "AutoEncoder": {"encoder.bias", "bias"},
    "AutoEncoderNew": {"encoder.bias", "decoder.bias"},
    "GatedAutoEncoder": {"decoder_bias", "gate_bias", "mag_bias", "r_mag"},
    "MatryoshkaBatchTopKSAE": {"k", "threshold", "group_sizes"},
    "JumpReluAutoEncoder": {"threshold"},
}
_OF_LINEAR = {"encoder.weight", "decoder.weight"}
_OF_MATRICES = {"W_enc", "b_enc", "W_dec", "b_dec"}
USED = words("activation_dim dict_class dict_size k layer lm_name submodule_name winnow_hook")
OF_TRAINING = words(
    """
    anneal_start auxk_alpha bandwidth decay_start device group_fractions group_sizes group_weights
    l1_penalty lr n_sparsity_updates p_end p_start resample_steps seed sparsity_function sparsity_penalty
    sparsity_queue_length sparsity_warmup_steps steps target_l0 threshold_beta threshold_start_step
    top_k_aux trainer_class wandb_name warmup_steps
    """
)
OF_BUFFER = words("ctx_len d_submodule device io layer n_ctxs out_batch_size refresh_batch_size")
WRITTEN = {
    "topk": ("AutoEncoderTopK", "TopKTrainer"),
    "batchtopk": ("BatchTopKSAE", "BatchTopKTrainer"),
    "relu": ("AutoEncoder", "StandardTrainer"),
    "jumprelu": ("JumpReluAutoEncoder", "JumpReluTrainer"),
}


def read(path: Path) -> Plain:
    """Read the folder that holds both files."""
    path = folder_of(path)
    config, origin = read_json(path / CONFIG), path / CONFIG
    trainer, buffer = (config.get(name) or {} for name in ("trainer", "buffer"))
    name, file = trainer.get("dict_class"), path / WEIGHTS
    known = _LINEAR | _MATRICES
    if name not in known:
        raise ConfigError(f"{path / CONFIG}: dict_class", expected=", ".join(known), got=name)
    state, activation = read_pt(file), known[name]
    refuse_tensors(state, _WEIGHTS_OF[name] | (_OF_LINEAR if name in _LINEAR else _OF_MATRICES), file)
    W_enc, b_enc, W_dec, b_dec = _linear(state, file) if name in _LINEAR else _matrices(state, file)
    # TopK has a threshold in its files too, of an option that uses it in place of the K best: not needed.
    threshold = None
    if name == "GatedAutoEncoder":
        W_enc, threshold = as_jumprelu(
            W_enc, take(state, "gate_bias", file), b_enc, take(state, "r_mag", file)
        )
    elif activation in ("batchtopk", "jumprelu"):
        threshold = take(state, "threshold", file)
    # -1 is the library's initial value: training ended before the threshold was estimated.
    if activation == "batchtopk" and threshold is not None and threshold < 0:
        raise ConfigError(
            f"{file}: no threshold was estimated in training",
            fix="Train past its `threshold_start_step`: until then every positive latent is active there",
        )
    for field, size in zip(("dict_size", "activation_dim"), W_enc.shape, strict=True):
        require_size(origin, field, trainer.get(field), size)
    taken = name not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    # In the config, in the state dict, or in both, which must then agree (below).
    k = trainer.get("k", state.get("k"))
    k = int(k) if k is not None else None
    if activation == "topk" and k is None:
        raise IntegrityError(f"{path / CONFIG}: trainer.k", expected="a number")
    if isinstance(state.get("group_sizes"), Tensor):
        require_size(file, "the sum of group_sizes", int(state["group_sizes"].sum()), len(W_enc))
    if k is not None and "k" in state:
        require_size(origin, "trainer.k", k, int(state["k"]))
    sizes, (hook, notes) = state.get("group_sizes"), _hook(trainer, buffer)
    notes += unknown_fields(trainer, USED | OF_TRAINING, origin)
    notes += unknown_fields(buffer, OF_BUFFER, origin)
    notes += unknown_fields(config, {"trainer", "buffer"}, origin)
    return Plain(
        activation=activation,  # pyright: ignore[reportArgumentType]
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_in=b_dec if taken else torch.zeros_like(b_dec),
        b_out=b_dec,
        k=k,
        threshold=threshold,
        # The file has the sizes of the groups, Winnow the prefixes that they add up to.
        matryoshka=tuple(accumulate(sizes.tolist())) if isinstance(sizes, Tensor) else (),
        hook=hook,
        model=trainer.get("lm_name"),
        notes=notes,
    )


def _linear(state: dict[str, Any], file: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_enc [N, D], b_enc or `mag_bias` [N], W_dec [N, D] and b_dec [D] of a class built of `nn.Linear`."""
    biases = ("b_dec", "bias", "decoder.bias", "decoder_bias")
    bias = next((name for name in biases if name in state), "b_dec")
    return (
        take(state, "encoder.weight", file),
        take(state, "mag_bias" if "mag_bias" in state else "encoder.bias", file),
        take(state, "decoder.weight", file).T,
        take(state, bias, file),
    )


def _matrices(state: dict[str, Any], file: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same of a class that holds its matrices itself, the encoder as [D, N]."""
    return (
        take(state, "W_enc", file).T,
        take(state, "b_enc", file),
        take(state, "W_dec", file),
        take(state, "b_dec", file),
    )


def _hook(trainer: dict[str, Any], buffer: dict[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    """The hook, and notes on it, from `submodule_name`, such as `resid_post_layer_8`."""
    layer, name = trainer.get("layer"), str(trainer.get("submodule_name") or "")
    # Our own exports carry the hook's exact name, so that a round trip loses nothing.
    told = trainer.get("winnow_hook")
    if isinstance(told, str) and HOOK.fullmatch(told):
        return told, ()
    into = buffer.get("io") == "in"
    site = name.removesuffix(f"_layer_{layer}") if isinstance(layer, int) else ""
    # Only the residual stream means the same everywhere. `mlp` or `attn` is the module's own output, which
    # Gemma 2 and 3 and OLMo 2 and 3 norm before they add it: it must not become `mlp_out`.
    if site in ("resid_pre", "resid_post") and not (into and site == "resid_pre"):
        return f"resid_pre.{layer}" if into else f"{site}.{layer}", ()
    path = module_path(name)
    if path and not into:
        return path, added_note(path)
    if not name:
        return None, ()
    what = "the input of" if into else "the own output of"
    return None, (
        f"it reads {what} the module that its author calls {name}: --hook says which that is, a module such "
        f"as model.layers.{layer or 0}.mlp, or mlp_out.{layer or 0} on families that add it unchanged",
    )


def write(plain: Plain, folder: Path) -> None:
    """Write `ae.pt` and `config.json`, for `dictionary_learning.utils.load_dictionary`."""
    if plain.transcoder:
        raise refuse(NAME, "a transcoder", "Export to sparsify or saelens")
    if plain.epsilon is not None:
        raise refuse(
            NAME,
            "an SAE of layer-normed rows: it reads raw ones",
            "Each row has its own mean and norm, which weights cannot express. Export to openai or saelens",
        )
    dict_class, trainer_class = WRITTEN[plain.activation]
    jump = plain.activation == "jumprelu"
    # The JumpReLU class subtracts nothing from its input, the others subtract the output's bias.
    plain = plain.taking(torch.zeros_like(plain.b_in) if jump else plain.b_out).single()
    if jump:
        state = {"W_enc": plain.W_enc.T.contiguous(), "b_enc": plain.b_enc, "W_dec": plain.W_dec}
        state |= {"b_dec": plain.b_out, "threshold": plain.thresholds}
    else:
        state = {"encoder.weight": plain.W_enc, "encoder.bias": plain.b_enc}
        state |= {"decoder.weight": plain.W_dec.T.contiguous()}
        state["bias" if plain.activation == "relu" else "b_dec"] = plain.b_out
        if plain.activation != "relu":
            # The library's own value for "no threshold": TopK then selects the K best.
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
        # In the library's own form; the exact hook is beside it, since this name is read as free text.
        "submodule_name": f"{plain.hook.partition('.')[0]}_layer_{layer}"
        if plain.hook and layer is not None
        else None,
        "device": "cpu",
        "winnow_hook": plain.hook,
    }
    torch.save(state, folder / WEIGHTS)
    write_json(folder / CONFIG, {"trainer": trainer})
