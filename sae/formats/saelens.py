"""SAELens: `cfg.json` and `sae_weights.safetensors`.

`W_enc` [D, N], `b_enc` [N], `W_dec` [N, O], `b_dec` [O], `threshold` [N] (JumpReLU), `W_skip` [O, D]; a gated
SAE has `b_gate`, `b_mag` and `r_mag` [N] in place of `b_enc`.
`apply_b_dec_to_input` says whether `b_dec` is subtracted from the input; a transcoder's never is. With
`normalize_activations: layer_norm` rows are layer-normed; a transcoder's output is raw nevertheless.
BatchTopK is saved as JumpReLU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from winnow.sae.formats.fields import refuse_tensors, require_size
from winnow.sae.formats.files import (
    folder_of,
    read_json,
    read_safetensors,
    refuse,
    take,
    write_json,
    write_safetensors,
)
from winnow.sae.formats.gated import as_jumprelu
from winnow.sae.formats.lens import CENTRES, read_loading
from winnow.sae.formats.names import from_lens, is_at, is_lens_name, layer_of, to_lens
from winnow.sae.formats.plain import Plain
from winnow.sae.formats.saelens_fields import (
    is_layer_normed,
    joined,
    k_of,
    kind_of,
    matryoshka_of,
    notes_on,
    tensors_of,
)
from winnow.schemas.errors import ConfigError, IntegrityError
from winnow.schemas.training import Activation

NAME = "saelens"
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
# Added to the standard deviation by the library's layer norm; imported SAEs keep it exactly.
EPSILON = 1e-5
_LAYOUT = "6.0.0"
"""The first SAELens that reads this layout."""
_CENTRED_NOTE = (
    "its subject was loaded with center_writing_weights: each row's mean over D is removed before encoding "
    "and added to the reconstruction"
)
_CENTRED_TARGET_NOTE = (
    "its target was centred (center_writing_weights): its output lacks each target row's mean over D, which "
    "it was never shown"
)
_UNKNOWN_CENTRING_NOTE = (
    "neither an option nor a version tells whether its rows were centred (center_writing_weights), as "
    "TransformerLens does by default to models with LayerNorm, and SAELens did before 3.19.2; they are taken "
    "as not centred: --centred or --not-centred says which"
)


def read(path: Path, *, centred: bool | None = None) -> Plain:
    """Read the folder of one SAE, written by any version of SAELens.

    Args:
        path: The folder, or a file of it.
        centred: Whether its rows were centred by TransformerLens; None takes it from the files.
    """
    path = folder_of(path)
    config, tensors, file = read_json(path / CONFIG), read_safetensors(path / WEIGHTS), path / WEIGHTS
    origin = path / CONFIG
    about = joined(config, origin)
    architecture, activation = kind_of(config, origin)
    transcoder, epsilon = "transcoder" in architecture, EPSILON if is_layer_normed(config, origin) else None
    refuse_tensors(tensors, tensors_of(architecture), file)
    _refuse_parts(config, tensors, path, transcoder=transcoder, layer_normed=epsilon is not None)
    W_enc, b_enc, W_dec, b_dec = _matrices(config, tensors, path, architecture)
    if architecture == "gated":
        W_enc, threshold = as_jumprelu(
            W_enc, take(tensors, "b_gate", file), b_enc, take(tensors, "r_mag", file)
        )
    else:
        threshold = _threshold(activation, tensors, file)
    taken, k = not transcoder and config.get("apply_b_dec_to_input", True), k_of(config, len(W_enc), origin)
    if activation == "topk" and k is None:
        raise IntegrityError(f"{origin}: k", expected="a number")
    loading, hook = read_loading(about), _hook(about, "hook_name", "hook_point", "hf_hook_name")
    target = _hook(about, "hook_name_out", "hf_hook_name_out") if transcoder else None
    read_centred = loading.centres(about.get("hook_name") or about.get("hook_point"))
    target_centred = transcoder and loading.centres(about.get("hook_name_out"))
    if centred is not None:
        read_centred = centred
    # Layer norm removes the mean of a row and restores it, whatever it is: nothing is left to convert.
    if epsilon is not None:
        read_centred = False
    return Plain(
        activation=activation,
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_in=b_dec if taken else torch.zeros(W_enc.shape[1]),
        b_out=b_dec,
        k=k,
        threshold=threshold,
        W_skip=take(tensors, "W_skip", file) if "W_skip" in tensors else None,
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


def _refuse_parts(
    config: dict[str, Any], tensors: dict[str, Tensor], path: Path, *, transcoder: bool, layer_normed: bool
) -> None:
    """Refuse what SAELens computes and Winnow does not.

    Raises:
        ConfigError: It names the part.
    """
    file, origin = path / WEIGHTS, path / CONFIG
    # 1 for an SAE whose factor was folded or never used; any other scales the codes.
    scaling = tensors.get("scaling_factor")
    if scaling is not None and not torch.allclose(scaling, torch.ones_like(scaling)):
        raise ConfigError(f"{file}: a scaling_factor that is not folded", fix="Fold it with SAELens first")
    if "W_skip" in tensors and layer_normed:
        raise ConfigError(
            f"{path}: a skip connection beside layer_norm", fix="Its skip reads raw rows, its latents do not"
        )
    if transcoder and config.get("apply_b_dec_to_input"):
        raise ConfigError(
            f"{origin}: apply_b_dec_to_input",
            expected="false: a transcoder's b_dec is its output's",
            got="true",
        )
    # `hook_z` only joins the heads of an activation of [B, T, heads, D / heads]; the weights are the same.
    if (reshape := config.get("reshape_activations") or "none") not in ("none", "hook_z"):
        raise ConfigError(f"{origin}: reshape_activations", expected="none or hook_z", got=reshape)


def _matrices(
    config: dict[str, Any], tensors: dict[str, Tensor], path: Path, architecture: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_enc [N, D], b_enc (a gated SAE's b_mag) [N], W_dec [N, O] and b_dec [O], decoder norms folded."""
    names = ("W_enc", "b_mag" if architecture == "gated" else "b_enc", "W_dec", "b_dec")
    W_enc, b_enc, W_dec, b_dec = (take(tensors, name, path / WEIGHTS) for name in names)
    W_enc = W_enc.T
    for name, size in zip(("d_sae", "d_in", "d_out"), (*W_enc.shape, W_dec.shape[-1]), strict=True):
        require_size(path / CONFIG, name, config.get(name), size)
    # Such an SAE selects by pre-activation times decoder norm: the same latents as those of an encoder scaled
    # by it, with unit decoder rows. Others ignore the option, as SAELens does (`notes_on`).
    if config.get("rescale_acts_by_decoder_norm") and "topk" in architecture:
        norms = W_dec.double().norm(dim=1).clamp_min(1e-8)
        W_enc, b_enc, W_dec = W_enc * norms[:, None], b_enc * norms, W_dec / norms[:, None]
    return W_enc, b_enc, W_dec, b_dec


def _centring_notes(of_input: bool | None, of_target: bool | None) -> tuple[str, ...]:
    """Notes on centred rows: of the input, of a transcoder's target, or of not knowing."""
    notes = [_CENTRED_NOTE] if of_input else []
    notes += [_CENTRED_TARGET_NOTE] if of_target else []
    return (*notes, _UNKNOWN_CENTRING_NOTE) if None in (of_input, of_target) else tuple(notes)


def _hook(about: dict[str, Any], *names: str) -> str | None:
    """The first of the fields that is one of Winnow's hooks or a module, otherwise the first there is."""
    found = [hook for name in names if (hook := from_lens(about.get(name)))]
    return next((hook for hook in found if not is_lens_name(hook)), found[0] if found else None)


def _threshold(activation: Activation, tensors: dict[str, Tensor], file: Path) -> Tensor | None:
    """The threshold, [N] of JumpReLU and [] of BatchTopK."""
    if activation == "jumprelu":
        # Checkpoints of training before version 6 hold the logarithm.
        if "log_threshold" in tensors:
            return take(tensors, "log_threshold", file).exp()
        return take(tensors, "threshold", file)
    return take(tensors, "topk_threshold", file).reshape(()) if activation == "batchtopk" else None


def write(plain: Plain, folder: Path) -> None:
    """Write `cfg.json` and `sae_weights.safetensors`, for `SAE.load_from_disk`."""
    if plain.transcoder and plain.activation == "topk":
        raise refuse(NAME, "a TopK transcoder", "Its transcoders are ReLU or JumpReLU. Export to sparsify")
    if plain.W_skip is not None and plain.epsilon is not None:
        raise refuse(NAME, "a skip connection from layer-normed rows", "Its skip reads raw rows")
    # BatchTopK goes out as SAELens itself publishes it: as JumpReLU with the one threshold for every latent.
    architecture = {"topk": "topk", "relu": "standard"}.get(plain.activation, "jumprelu")
    if plain.transcoder:
        kind = "skip_transcoder" if plain.W_skip is not None else "transcoder"
        architecture = kind if plain.activation == "relu" else f"jumprelu_{kind}"
    # An SAE subtracts `b_dec` from its input (`apply_b_dec_to_input`), a transcoder nothing.
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
    write_safetensors(tensors, folder / WEIGHTS)
    write_json(folder / CONFIG, _config(plain, architecture))


def write_with_subject(plain: Plain, folder: Path) -> None:
    """Write the same files, if SAEBench and Neuronpedia can run the subject from what they say."""
    # A `package://` name is one of ours, for a GGUF file; TransformerLens does not know it.
    missing = [name for name in ("model", "hook") if getattr(plain, name) is None]
    if missing or (plain.model or "").startswith("package://"):
        raise ConfigError(
            "SAEBench and Neuronpedia run the subject themselves",
            expected="a model's name in TransformerLens and a hook",
            got=f"model {plain.model!r}, hook {plain.hook!r}",
            fix="Give --model; import with --hook",
        )
    # They run HookedTransformer, which has no hook between the MLP's norm and the MLP, and gives heads apart.
    if layer_of(plain.hook) is None or is_at(plain.hook, "mlp_in", "attn_z"):
        raise refuse(
            "SAEBench or Neuronpedia",
            f"hook {plain.hook!r}, which TransformerLens' HookedTransformer does not know as rows",
            "Export to saelens",
        )
    write(plain, folder)


def _config(plain: Plain, architecture: str) -> dict[str, Any]:
    latents, width = plain.W_enc.shape
    metadata = {
        "sae_lens_version": _LAYOUT,
        "model_name": plain.model,
        "hook_name": to_lens(plain.hook),
        "hook_layer": layer_of(plain.hook),
        "hook_head_index": None,
        # Not known means no BOS here; the field has no third value.
        "prepend_bos": bool(plain.bos),
    }
    if plain.centred:
        metadata["model_from_pretrained_kwargs"] = {CENTRES: True}
    # A module's path exists in transformers' model only, so SAELens must load that one.
    if plain.hook and layer_of(plain.hook) is None and not is_lens_name(plain.hook):
        metadata["model_class_name"] = "AutoModelForCausalLM"
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": width,
        "d_sae": latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not plain.transcoder,
        "normalize_activations": "none" if plain.epsilon is None else "layer_norm",
        "reshape_activations": "hook_z" if is_at(plain.hook, "attn_z") else "none",
        "metadata": metadata,
    }
    # Winnow selects by the pre-activation alone, whatever the decoder rows' norms.
    if architecture == "topk":
        config |= {"k": plain.k, "rescale_acts_by_decoder_norm": False}
    if plain.transcoder:
        config["d_out"] = plain.W_dec.shape[1]
        metadata["hook_name_out"] = to_lens(plain.target_hook)
    return config
