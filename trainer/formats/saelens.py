"""SAELens: `cfg.json` and `sae_weights.safetensors`.

`W_enc` [D, N], `b_enc` [N], `W_dec` [N, O], `b_dec` [O], `threshold` [N] (JumpReLU), `W_skip` [O, D].
`apply_b_dec_to_input` says whether `b_dec` is taken from the input; a transcoder never does. With
`normalize_activations: layer_norm` rows are layer-normed; a transcoder's output is raw all the same.
BatchTopK is saved as JumpReLU. TopK with `rescale_acts_by_decoder_norm` chooses by pre-activation times
decoder norm: folded by making the decoder's rows unit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from schemas.errors import ConfigError, IntegrityError
from schemas.training import Activation
from trainer.formats.files import folder_of, read_json, read_safetensors, refuse, take, write_json
from trainer.formats.names import from_lens, layer_of, to_lens
from trainer.formats.plain import Plain

NAME = "saelens"
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
EPSILON = 1e-5
LAYOUT = "6.0.0"
"""The first SAELens that reads this layout."""
ACTIVATIONS: dict[str, Activation] = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "batchtopk": "batchtopk",
    "matryoshka_batchtopk": "batchtopk",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}


def read(path: Path) -> Plain:
    """The folder of one SAE, from any version of SAELens."""
    path = folder_of(path)
    config, tensors, file = read_json(path / CONFIG), read_safetensors(path / WEIGHTS), path / WEIGHTS
    about = config | (config.get("metadata") or {})
    architecture = _architecture(config)
    if architecture not in ACTIVATIONS:
        expected = ", ".join(ACTIVATIONS)
        raise ConfigError(f"{path / CONFIG}: architecture", expected=expected, got=architecture)
    activation, transcoder = ACTIVATIONS[architecture], "transcoder" in architecture
    epsilon = _epsilon(config, path / CONFIG)
    scaling = tensors.get("scaling_factor")
    if scaling is not None and not torch.allclose(scaling, torch.ones_like(scaling)):
        raise ConfigError(f"{file}: a scaling_factor that is not folded", fix="Fold it with SAELens first")
    skip = take(tensors, "W_skip", file) if "W_skip" in tensors else None
    if skip is not None and epsilon is not None:
        raise ConfigError(
            f"{path}: a skip connection beside layer_norm", fix="Its skip reads raw rows, its latents do not"
        )
    W_enc, b_dec = take(tensors, "W_enc", file).T, take(tensors, "b_dec", file)
    b_enc = take(tensors, "b_enc", file) if "b_enc" in tensors else torch.zeros(len(W_enc))
    W_dec = take(tensors, "W_dec", file)
    if config.get("rescale_acts_by_decoder_norm"):
        norms = W_dec.double().norm(dim=1).clamp_min(1e-8)
        W_enc, b_enc, W_dec = W_enc * norms[:, None], b_enc * norms, W_dec / norms[:, None]
    taken = not transcoder and config.get("apply_b_dec_to_input", True)
    k = _k(config)
    if activation == "topk" and k is None:
        raise IntegrityError(f"{path / CONFIG}: k", expected="a number")
    return Plain(
        activation=activation,
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_in=b_dec if taken else torch.zeros(W_enc.shape[1]),
        b_out=b_dec,
        k=k,
        threshold=_threshold(activation, tensors, file),
        W_skip=skip,
        epsilon=epsilon,
        transcoder=transcoder,
        hook=from_lens(about.get("hook_name") or about.get("hook_point")),
        target_hook=from_lens(about.get("hook_name_out")) if transcoder else None,
        model=about.get("model_name"),
    )


def _architecture(config: dict[str, Any]) -> str:
    """Before version 6 TopK was a `standard` SAE with another activation function."""
    function = config.get("activation_fn_str") or config.get("activation_fn")
    return "topk" if function == "topk" else str(config.get("architecture", "standard"))


def _k(config: dict[str, Any]) -> int | None:
    k = config.get("k") or (config.get("activation_fn_kwargs") or {}).get("k")
    return None if k is None else round(k)


def _epsilon(config: dict[str, Any], file: Path) -> float | None:
    mode = config.get("normalize_activations") or "none"
    if mode == "none":
        return None
    if mode == "layer_norm":
        return EPSILON
    raise ConfigError(
        f"{file}: normalize_activations",
        expected="none or layer_norm",
        got=mode,
        fix="Its factors are not in the files: fold them with SAELens first",
    )


def _threshold(activation: Activation, tensors: dict[str, Tensor], file: Path) -> Tensor | None:
    if activation == "jumprelu":
        return take(tensors, "threshold", file)
    return take(tensors, "topk_threshold", file).reshape(()) if activation == "batchtopk" else None


def write(plain: Plain, folder: Path) -> None:
    """`cfg.json` and `sae_weights.safetensors`, for `SAE.load_from_disk`."""
    if plain.transcoder and plain.activation == "topk":
        raise refuse(NAME, "a TopK transcoder", "Its transcoders are ReLU or JumpReLU. Export to sparsify")
    if plain.W_skip is not None and plain.epsilon is not None:
        raise refuse(NAME, "a skip connection from layer-normed rows", "Its skip reads raw rows")
    architecture = {"topk": "topk", "relu": "standard"}.get(plain.activation, "jumprelu")
    if plain.transcoder:
        kind = "skip_transcoder" if plain.W_skip is not None else "transcoder"
        architecture = kind if plain.activation == "relu" else f"jumprelu_{kind}"
    plain = plain.taking(torch.zeros_like(plain.b_in) if plain.transcoder else plain.b_out).single()
    tensors = {
        "W_enc": plain.W_enc.T.contiguous(),
        "b_enc": plain.b_enc,
        "W_dec": plain.W_dec,
        "b_dec": plain.b_out,
    }
    if architecture.startswith("jumprelu"):
        tensors["threshold"] = plain.thresholds
    if plain.W_skip is not None:
        tensors["W_skip"] = plain.W_skip
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    write_json(folder / CONFIG, _config(plain, architecture))


def write_with_subject(plain: Plain, folder: Path) -> None:
    """The same files, complete enough for SAEBench and Neuronpedia, which run the subject themselves."""
    missing = [name for name in ("model", "hook") if getattr(plain, name) is None]
    if missing or (plain.model or "").startswith("package://"):
        raise ConfigError(
            "SAEBench and Neuronpedia run the subject themselves",
            expected="a model's name in TransformerLens and a hook",
            got=f"model {plain.model!r}, hook {plain.hook!r}",
            fix="Give --model; import with --hook",
        )
    if layer_of(plain.hook) is None:
        raise refuse(
            "SAEBench or Neuronpedia",
            f"hook {plain.hook!r}, which TransformerLens does not know",
            "Export to saelens",
        )
    write(plain, folder)


def _config(plain: Plain, architecture: str) -> dict[str, Any]:
    latents, width = plain.W_enc.shape
    metadata = {
        "sae_lens_version": LAYOUT,
        "model_name": plain.model,
        "hook_name": to_lens(plain.hook),
        "hook_layer": layer_of(plain.hook),
        "hook_head_index": None,
        "prepend_bos": False,
    }
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": width,
        "d_sae": latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not plain.transcoder,
        "normalize_activations": "none" if plain.epsilon is None else "layer_norm",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    if architecture == "topk":
        config |= {"k": plain.k, "rescale_acts_by_decoder_norm": False}
    if plain.transcoder:
        config["d_out"] = plain.W_dec.shape[1]
        metadata["hook_name_out"] = to_lens(plain.target_hook)
    return config
