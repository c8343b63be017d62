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

from winnow.sae.formats.fields import refuse_tensors, require_size
from winnow.sae.formats.files import folder_of, read_json, read_safetensors, refuse, take, write_json
from winnow.sae.formats.lens import CENTRES, read_loading
from winnow.sae.formats.names import from_lens, is_lens_name, layer_of, to_lens
from winnow.sae.formats.plain import Plain
from winnow.sae.formats.saelens_fields import (
    OF_EVERY_SAE,
    THRESHOLDS,
    is_layer_normed,
    kind_of,
    matryoshka_of,
    notes_on,
)
from winnow.schemas.errors import ConfigError, IntegrityError
from winnow.schemas.training import Activation

NAME = "saelens"
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
EPSILON = 1e-5
LAYOUT = "6.0.0"
"""The first SAELens that reads this layout."""
CENTRED_NOTE = (
    "its subject was loaded with center_writing_weights: each row's mean over D is removed before encoding "
    "and added to what comes back"
)
CENTRED_TARGET_NOTE = (
    "its target was centred (center_writing_weights): what it gives lacks each target row's mean over D, "
    "which it was never shown"
)
UNKNOWN_CENTRING_NOTE = (
    "nothing tells whether its rows were centred (center_writing_weights), as TransformerLens does by "
    "default to models with LayerNorm, and SAELens did before 3.19.2; they are taken as they are: --centred "
    "or --not-centred says which"
)


def read(path: Path, *, centred: bool | None = None) -> Plain:
    """The folder of one SAE, from any version of SAELens.

    Args:
        path: The folder, or a file of it.
        centred: Whether its rows were centred by TransformerLens; null takes it from the files.
    """
    path = folder_of(path)
    config, tensors, file = read_json(path / CONFIG), read_safetensors(path / WEIGHTS), path / WEIGHTS
    origin, about = path / CONFIG, config | (config.get("metadata") or {})
    architecture, activation = kind_of(config, origin)
    transcoder, epsilon = "transcoder" in architecture, EPSILON if is_layer_normed(config, origin) else None
    allowed = OF_EVERY_SAE | THRESHOLDS.get(activation, set())
    refuse_tensors(tensors, allowed | ({"W_skip"} if "skip" in architecture else set()), file)
    scaling = tensors.get("scaling_factor")
    if scaling is not None and not torch.allclose(scaling, torch.ones_like(scaling)):
        raise ConfigError(f"{file}: a scaling_factor that is not folded", fix="Fold it with SAELens first")
    skip = take(tensors, "W_skip", file) if "W_skip" in tensors else None
    if skip is not None and epsilon is not None:
        raise ConfigError(
            f"{path}: a skip connection beside layer_norm", fix="Its skip reads raw rows, its latents do not"
        )
    W_enc, b_enc, W_dec, b_dec = (take(tensors, name, file) for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    W_enc = W_enc.T
    for name, size in zip(("d_sae", "d_in", "d_out"), (*W_enc.shape, W_dec.shape[-1]), strict=True):
        require_size(origin, name, config.get(name), size)
    if config.get("rescale_acts_by_decoder_norm") and activation in ("topk", "batchtopk"):
        norms = W_dec.double().norm(dim=1).clamp_min(1e-8)
        W_enc, b_enc, W_dec = W_enc * norms[:, None], b_enc * norms, W_dec / norms[:, None]
    if transcoder and config.get("apply_b_dec_to_input"):
        raise ConfigError(
            f"{origin}: apply_b_dec_to_input",
            expected="false: a transcoder's b_dec is its output's",
            got="true",
        )
    if (reshape := config.get("reshape_activations") or "none") not in ("none", "hook_z"):
        raise ConfigError(f"{origin}: reshape_activations", expected="none or hook_z", got=reshape)
    taken, k = not transcoder and config.get("apply_b_dec_to_input", True), _k(config)
    if activation == "topk" and k is None:
        raise IntegrityError(f"{origin}: k", expected="a number")
    loading, hook = read_loading(about), _hook(about, "hook_name", "hook_point", "hf_hook_name")
    target = _hook(about, "hook_name_out", "hf_hook_name_out") if transcoder else None
    read_centred = loading.centres(about.get("hook_name") or about.get("hook_point"))
    target_centred = transcoder and loading.centres(about.get("hook_name_out"))
    if centred is not None:
        read_centred = centred
    if epsilon is not None:
        read_centred = False  # layer norm removes the mean and restores it, whatever it is
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
        matryoshka=matryoshka_of(config, len(W_enc)),
        hook=hook,
        target_hook=target,
        model=about.get("model_name"),
        bos=None if (bos := about.get("prepend_bos")) is None else bool(bos),
        centred=bool(read_centred),
        notes=(
            *_centring_notes(read_centred, target_centred),
            *loading.notes((hook, target)),
            *notes_on(config, about, origin),
        ),
    )


def _centring_notes(of_input: bool | None, of_target: bool | None) -> tuple[str, ...]:
    notes = [CENTRED_NOTE] if of_input else []
    notes += [CENTRED_TARGET_NOTE] if of_target else []
    return (*notes, UNKNOWN_CENTRING_NOTE) if None in (of_input, of_target) else tuple(notes)


def _hook(about: dict[str, Any], *names: str) -> str | None:
    """The first that is one of Winnow's sites or a module, else the first there is."""
    found = [hook for name in names if (hook := from_lens(about.get(name)))]
    return next((hook for hook in found if not is_lens_name(hook)), found[0] if found else None)


def _k(config: dict[str, Any]) -> int | None:
    k = config.get("k") or (config.get("activation_fn_kwargs") or {}).get("k")
    return None if k is None else round(k)


def _threshold(activation: Activation, tensors: dict[str, Tensor], file: Path) -> Tensor | None:
    if activation == "jumprelu":
        if "log_threshold" in tensors:  # checkpoints before version 6
            return take(tensors, "log_threshold", file).exp()
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
        "prepend_bos": bool(plain.bos),
    }
    if plain.centred:
        metadata["model_from_pretrained_kwargs"] = {CENTRES: True}
    if plain.hook and layer_of(plain.hook) is None and not is_lens_name(plain.hook):
        metadata["model_class_name"] = "AutoModelForCausalLM"  # a module of transformers' model
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
