"""circuit-tracer's transcoder sets (decoderesearch/circuit-tracer, April 2026), per-layer and cross-layer.

Legend: L layers, N latents, D width.

A folder with `config.yaml` and

- per-layer (`model_kind: transcoder_set`): `layer_{l}.safetensors` of W_enc [N, D], W_dec [N, D], b_enc,
  b_dec, with thresholds `activation_function.threshold` [N], with a skip `W_skip` [D, D] (``W_skip @ x``);
- cross-layer (`cross_layer_transcoder`): `W_enc_{l}.safetensors` of W_enc_{l} [N, D], b_enc_{l}, b_dec_{l},
  with thresholds `threshold_{l}` [N], and `W_dec_{l}.safetensors` of W_dec_{l} [N, L - l, D].

Rows are raw. It wants every layer from 0, and counts them by the files.
"""

from __future__ import annotations

import logging
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from winnow.sae.formats.fields import refuse_tensors, unknown_fields, words
from winnow.sae.formats.files import folder_of, read_safetensors, refuse, require, take, write_safetensors
from winnow.sae.formats.raw import RawLayer, RawSet, fold
from winnow.sae.sets import TranscoderSet
from winnow.schemas.errors import ConfigError, IntegrityError
from winnow.schemas.layers import Reads, SetSpec
from winnow.schemas.training import Activation

NAME = "circuit-tracer"
log = logging.getLogger("winnow.sae")
CONFIG = "config.yaml"
PER_LAYER, CROSS = "transcoder_set", "cross_layer_transcoder"
KINDS = {PER_LAYER: "layer_{}.safetensors", CROSS: "W_enc_{}.safetensors"}
"""`model_kind` and the files by which layers are counted."""
_THRESHOLD = "activation_function.threshold"
USED = words("model_kind model_name feature_input_hook feature_output_hook transcoders activation k")
# Where it came from, and under which name Neuronpedia shows its latents.
OF_ORIGIN = words("scan repo_id revision subfolder features")
READ_HOOKS: dict[str, Reads] = {
    "hook_resid_mid": "resid_mid",
    "hook_mlp_in": "resid_mid",
    "mlp.hook_in": "mlp_in",
}
"""TransformerLens' names with circuit-tracer's settings, which fold no norm into the weights."""
_INPUT = {reads: hook for hook, reads in reversed(READ_HOOKS.items())}
_OWN_OUTPUT_NOTE = (
    "it predicts mlp.hook_out, the module's own output: on a family that norms it before it is added "
    "(Gemma 2 and 3, OLMo 2 and 3), that is not mlp_out"
)
TOPK_NOTE = "its TopK keeps a negative value that is among the K largest; here such a latent is inactive"
_OLDER_READERS = (
    "circuit-tracer reads `activation: topk` from April 2026 on; its fork 0.5.0 on PyPI ignores it and "
    "computes a ReLU. With --dataset the export has thresholds, which every version reads"
)


# ---- import --------------------------------------------------------------------------------------


def read(path: Path, reads: Reads | None = None) -> RawSet:
    """Read the folder; `reads` overrides what `config.yaml` says."""
    folder = folder_of(path)
    config = _config(folder)
    kind = config.get("model_kind") or _kind_of(folder)
    if kind not in KINDS:
        raise ConfigError(f"{folder / CONFIG}: model_kind", expected=" or ".join(KINDS), got=kind)
    files = _layer_files(folder, config, kind)
    reads, notes = _hooks(folder, config, reads)
    of = SetSpec(layers=(0, len(files) - 1), cross=kind == CROSS, reads=reads)
    activation, k = _activation(folder, config, files[0], kind)
    if activation == "topk":
        notes = (*notes, TOPK_NOTE)
    notes = (*notes, *unknown_fields(config, USED | OF_ORIGIN, folder / CONFIG))
    read_layer = partial(_read_cross if kind == CROSS else _read_layer, files, activation)
    return RawSet(of, activation, read_layer, k=k, notes=notes)


def _config(folder: Path) -> dict[str, Any]:
    """`config.yaml`, or nothing: a cross-layer transcoder is often passed on without one."""
    path = folder / CONFIG
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{path} is not YAML", got=" ".join(str(error).split())[:200]) from error
    if not isinstance(found, dict):
        raise IntegrityError(f"{path}", expected="a mapping", got=type(found).__name__)
    return found


def _kind_of(folder: Path) -> str:
    found = [kind for kind, name in KINDS.items() if (folder / name.format(0)).is_file()]
    if len(found) != 1:
        expected = f"{CONFIG}, layer_0.safetensors or W_enc_0.safetensors in {folder}"
        raise ConfigError(f"{folder} is no transcoder set of circuit-tracer", expected=expected)
    return found[0]


def _layer_files(folder: Path, config: dict[str, Any], kind: str) -> list[Path]:
    """The file of each layer from 0: those that the config lists, or all of the kind's name."""
    listed = config.get("transcoders")
    if listed and kind == PER_LAYER:
        # Entries are addresses at a hub or paths of their author's; here the files lie beside the config.
        return [require(folder / Path(str(entry).split("?")[0]).name) for entry in listed]
    pattern = re.compile(re.escape(KINDS[kind]).replace(r"\{\}", r"(\d+)"))
    found = {int(match[1]): file for file in folder.iterdir() if (match := pattern.fullmatch(file.name))}
    if not found or sorted(found) != list(range(len(found))):
        raise ConfigError(
            f"the layers in {folder}",
            expected=f"{KINDS[kind].format('L')} of every layer from 0",
            got=sorted(found),
        )
    return [found[layer] for layer in range(len(found))]


def _hooks(folder: Path, config: dict[str, Any], reads: Reads | None) -> tuple[Reads, tuple[str, ...]]:
    """What the latents read, and notes."""
    origin = folder / CONFIG
    given, written = config.get("feature_input_hook"), config.get("feature_output_hook", "hook_mlp_out")
    if written not in ("hook_mlp_out", "mlp.hook_out"):
        raise ConfigError(
            f"{origin}: feature_output_hook", expected="hook_mlp_out or mlp.hook_out", got=written
        )
    found = reads or READ_HOOKS.get(str(given))
    if found is None:
        # `ln2.hook_normalized` comes before the norm's gain with some versions and after it with others.
        raise ConfigError(
            f"{origin}: feature_input_hook",
            expected=" or ".join(READ_HOOKS),
            got=given or "nothing",
            fix="If you know that these weights read what the MLP is given, or the stream before its norm, "
            "say --reads mlp_in or --reads resid_mid",
        )
    return found, (_OWN_OUTPUT_NOTE,) if written == "mlp.hook_out" else ()


def _activation(
    folder: Path, config: dict[str, Any], first: Path, kind: str
) -> tuple[Activation, int | None]:
    """The activation of all layers, and K."""
    said, tensors = config.get("activation"), read_safetensors(first)
    if said == "topk" and kind == PER_LAYER:
        k = config.get("k") or (int(tensors["k"]) if "k" in tensors else None)
        if not isinstance(k, int) or k < 1:
            raise ConfigError(f"{folder / CONFIG}: k", expected="the number of active latents per row", got=k)
        return "topk", k
    if said not in (None, "relu", "jumprelu", "jump_relu"):
        raise ConfigError(f"{folder / CONFIG}: activation", expected="relu, jumprelu or topk", got=said)
    # As its own reader does: a file with thresholds is a JumpReLU unless the config says ReLU.
    has = "threshold_0" in tensors if kind == CROSS else _THRESHOLD in tensors
    return ("jumprelu" if has and said != "relu" else "relu"), None


def _read_layer(files: list[Path], activation: Activation, layer: int) -> RawLayer:
    path = files[layer]
    tensors = read_safetensors(path)
    if "w_enc" in tensors:
        raise ConfigError(f"{path} is a file of Gemma Scope 2", fix="Import the folder --from gemma-scope-2")
    refuse_tensors(tensors, {"W_enc", "W_dec", "b_enc", "b_dec", "W_skip", "k", _THRESHOLD}, path)
    return RawLayer(
        W_enc=take(tensors, "W_enc", path),
        b_enc=take(tensors, "b_enc", path),
        W_dec=take(tensors, "W_dec", path)[:, None],
        b_dec=take(tensors, "b_dec", path),
        threshold=take(tensors, _THRESHOLD, path) if activation == "jumprelu" else None,
        W_skip=take(tensors, "W_skip", path) if "W_skip" in tensors else None,
    )


def _read_cross(files: list[Path], activation: Activation, layer: int) -> RawLayer:
    path = files[layer]
    tensors = read_safetensors(path)
    refuse_tensors(tensors, {f"{name}_{layer}" for name in ("W_enc", "b_enc", "b_dec", "threshold")}, path)
    decoders = path.with_name(f"W_dec_{layer}.safetensors")
    W_dec = take(read_safetensors(decoders), f"W_dec_{layer}", decoders)
    if W_dec.ndim != 3 or W_dec.shape[1] != len(files) - layer:
        expected = f"[N, {len(files) - layer} targets, D] in a set of {len(files)} layers"
        raise IntegrityError(f"{decoders}: W_dec_{layer}", expected=expected, got=tuple(W_dec.shape))
    return RawLayer(
        W_enc=take(tensors, f"W_enc_{layer}", path),
        b_enc=take(tensors, f"b_enc_{layer}", path),
        W_dec=W_dec,
        b_dec=take(tensors, f"b_dec_{layer}", path),
        threshold=take(tensors, f"threshold_{layer}", path) if activation == "jumprelu" else None,
    )


# ---- export --------------------------------------------------------------------------------------


def check(of: SetSpec, activation: Activation) -> None:
    """Check that circuit-tracer can hold such a set.

    Raises:
        ConfigError: It cannot; the message says why.
    """
    if of.range.start != 0:
        raise refuse(
            NAME,
            f"a set of the layers {of.range.start} to {of.range.stop - 1}: it wants every layer from 0",
            "Train a set with `layers: all`",
        )
    if of.cross and activation == "topk":
        raise refuse(
            NAME,
            "a cross-layer transcoder with TopK: it has thresholds only",
            "Give --dataset, the dataset that it was trained on: thresholds are set on its rows, and what "
            "they cost is measured",
        )


def write(set_: TranscoderSet, folder: Path, model: str | None) -> None:
    """Write `config.yaml` and the layers' files."""
    parts = set_[0].parts
    check(set_.of, parts.activation)
    if set_.cross and parts.skip:
        raise refuse(NAME, "skips of a cross-layer transcoder", "Train it without `skip`")
    config: dict[str, Any] = {
        "model_kind": CROSS if set_.cross else PER_LAYER,
        "model_name": model,
        "feature_input_hook": _INPUT[set_.of.reads],
        "feature_output_hook": "hook_mlp_out",
        "scan": folder.name,
    }
    if parts.activation == "topk":
        config |= {"activation": "topk", "k": set_[0].k}
        log.warning("%s", _OLDER_READERS)
    for layer in set_.layers:
        if set_.cross:
            _write_cross(set_, layer, folder)
        else:
            raw = fold(set_[layer]).single()
            tensors = {"W_enc": raw.W_enc, "W_dec": raw.W_dec[:, 0], "b_enc": raw.b_enc, "b_dec": raw.b_dec}
            tensors |= {} if raw.threshold is None else {_THRESHOLD: raw.threshold}
            tensors |= {} if raw.W_skip is None else {"W_skip": raw.W_skip}
            _save(tensors, folder / f"layer_{layer}.safetensors")
    # Last, since it makes the folder a set. No `transcoders`: without it the folder may lie anywhere.
    (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def _write_cross(set_: TranscoderSet, layer: int, folder: Path) -> None:
    raw = fold(set_[layer]).single()
    tensors = {f"W_enc_{layer}": raw.W_enc, f"b_enc_{layer}": raw.b_enc, f"b_dec_{layer}": raw.b_dec}
    if raw.threshold is not None:
        tensors[f"threshold_{layer}"] = raw.threshold
    _save(tensors, folder / f"W_enc_{layer}.safetensors")
    _save({f"W_dec_{layer}": raw.W_dec}, folder / f"W_dec_{layer}.safetensors")


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    write_safetensors({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
