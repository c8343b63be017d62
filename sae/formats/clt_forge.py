"""CLT-Forge's sets (LLM-Interp/CLT-Forge, April 2026): `clt_cfg.json` and `clt_weights.safetensors`.

Legend: L layers, N latents, D width, P pairs of layers l <= m, L (L + 1) / 2 of them.

All layers are in one file: W_enc [L, D, N], b_enc [L, N], log_threshold [L, N]; of a cross-layer transcoder
W_dec [P, N, D] and b_dec [P, D], the pairs in the order of an upper triangle's rows; of a per-layer one
W_dec [L, N, D] and b_dec [L, D]. Rows are multiplied by `estimated_norm_scaling_factor_in` [L] before they
are encoded, and predictions are divided by `..._out` [L]. One trained with `feature_sharding` has a file
`rank{r}_clt_weights.safetensors` a rank, each with a part of the latents.

Its files do not say which rows are read. CLT-Forge's own training reads `ln2.hook_normalized`, the row before
the gain and bias of the MLP's norm, which is no hook of Winnow's.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from winnow.sae.formats.fields import refuse_tensors, require_size, unknown_fields, words
from winnow.sae.formats.files import folder_of, read_json, refuse, require, write_json, write_safetensors
from winnow.sae.formats.raw import RawLayer, RawSet, fold
from winnow.sae.sets import TranscoderSet
from winnow.schemas.errors import ConfigError, IntegrityError
from winnow.schemas.layers import Reads, SetSpec
from winnow.schemas.training import Activation

NAME = "clt-forge"
CONFIG, FILE = "clt_cfg.json", "clt_weights.safetensors"
USED = words("cross_layer_decoders d_in d_latent feature_sharding model_name n_layers")
OF_TRAINING = words(
    "device dtype seed debug jumprelu_bandwidth jumprelu_init_threshold dead_feature_window context_size "
    "l0_coefficient ddp fsdp functional_loss normalize_decoder"
)
_SCALES = ("estimated_norm_scaling_factor_in", "estimated_norm_scaling_factor_out")
_BUFFERS = {"feature_count", "layer_mask", "l_idx", "k_idx"}
_WEIGHTS = {"W_enc", "b_enc", "W_dec", "b_dec", "log_threshold"}
_SHARD = re.compile(r"rank(\d+)_clt_weights\.safetensors")


# ---- import --------------------------------------------------------------------------------------


def read(path: Path, reads: Reads | None = None) -> RawSet:
    """Read the folder; `reads` says what the latents read, which the files do not."""
    folder = folder_of(path)
    config = read_json(folder / CONFIG)
    if reads is None:
        raise ConfigError(
            f"{folder} does not say which rows its latents read",
            expected="--reads resid_mid or --reads mlp_in",
            fix="CLT-Forge trains on ln2.hook_normalized: what the MLP is given (mlp_in) without the gain "
            "and bias of its norm. Fold them into W_enc and b_enc first",
        )
    files = _files(folder, bool(config.get("feature_sharding")))
    layers, cross = config.get("n_layers"), bool(config.get("cross_layer_decoders"))
    shapes = [_shapes(file) for file in files]
    found = shapes[0]["W_enc"][0]
    require_size(folder / CONFIG, "n_layers", layers, found)
    require_size(folder / CONFIG, "d_in", config.get("d_in"), shapes[0]["W_enc"][1])
    require_size(folder / CONFIG, "d_latent", config.get("d_latent"), sum(one["W_enc"][2] for one in shapes))
    decoders = found * (found + 1) // 2 if cross else found
    if shapes[0]["W_dec"][0] != decoders:
        raise IntegrityError(f"{files[0]}: W_dec", expected=f"{decoders} decoders", got=shapes[0]["W_dec"][0])
    of = SetSpec(layers=(0, found - 1), cross=cross, reads=reads)
    notes = unknown_fields(config, USED | OF_TRAINING, folder / CONFIG)
    return RawSet(of, "jumprelu", partial(_read, files, of), notes=notes)


def _files(folder: Path, sharded: bool) -> list[Path]:
    if not sharded:
        return [require(folder / FILE)]
    found = {int(match[1]): file for file in folder.iterdir() if (match := _SHARD.fullmatch(file.name))}
    if not found or sorted(found) != list(range(len(found))):
        raise ConfigError(
            f"the ranks' files in {folder}",
            expected="rank0_clt_weights.safetensors and on",
            got=sorted(found),
        )
    return [found[rank] for rank in range(len(found))]


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The tensors' shapes, without loading them."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise IntegrityError(f"{path} is not safetensors", got=error) from error
    # Its own reader skips these: the subject that was attached while it was trained.
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith("model.")}
    refuse_tensors(shapes, _WEIGHTS | _BUFFERS | set(_SCALES), path)
    if missing := sorted((_WEIGHTS | set(_SCALES)) - set(shapes)):
        raise IntegrityError(f"{path} lacks {', '.join(missing)}", got=", ".join(sorted(shapes)))
    return shapes


def _read(files: list[Path], of: SetSpec, layer: int) -> RawLayer:
    """One layer: parts of the files are read, since one file holds all layers."""
    size = len(of.range)
    pairs = [_pair(size, layer, target) for target in of.targets(layer)] if of.cross else [layer]
    with safe_open(files[0], framework="pt") as file:
        scale_in, scale_out = (file.get_tensor(name).double() for name in _SCALES)
        biases = file.get_tensor("b_dec").double()
    # Every decoder has a bias of its own there; here the target's own layer holds their sum.
    into = [_pair(size, source, layer) for source in range(layer + 1)] if of.cross else [layer]
    parts: list[dict[str, Tensor]] = []
    for path in files:
        with safe_open(path, framework="pt") as file:
            part = {n: file.get_slice(n)[layer].double() for n in ("W_enc", "b_enc", "log_threshold")}
            decoders = file.get_slice("W_dec")
            part["W_dec"] = torch.stack([decoders[pair].double() for pair in pairs], dim=1)
        parts.append(part)
    joined = {
        name: torch.cat([part[name] for part in parts], dim=-1)
        for name in ("W_enc", "b_enc", "log_threshold")
    }
    outs = scale_out[list(of.targets(layer))]
    return RawLayer(
        W_enc=joined["W_enc"].T * scale_in[layer],
        b_enc=joined["b_enc"],
        W_dec=torch.cat([part["W_dec"] for part in parts]) / outs[:, None],
        b_dec=biases[into].sum(0) / scale_out[layer],
        threshold=joined["log_threshold"].exp(),
    ).single()


def _pair(layers: int, source: int, target: int) -> int:
    """Place of a decoder in the upper triangle's order."""
    return source * layers - source * (source - 1) // 2 + target - source


# ---- export --------------------------------------------------------------------------------------


def check(of: SetSpec, activation: Activation) -> None:
    """Check that CLT-Forge can hold such a set.

    Raises:
        ConfigError: It cannot; the message says why.
    """
    if of.range.start != 0:
        raise refuse(
            NAME,
            f"a set of the layers {of.range.start} to {of.range.stop - 1}: it wants every layer from 0",
            "Train a set with `layers: all`",
        )
    if activation == "topk":
        raise refuse(
            NAME,
            "TopK: it has thresholds only",
            "Give --dataset, the dataset that it was trained on: thresholds are set on its rows, and what "
            "they cost is measured",
        )


def write(set_: TranscoderSet, folder: Path, model: str | None) -> None:
    """Write `clt_cfg.json` and `clt_weights.safetensors`."""
    parts = set_[0].parts
    check(set_.of, parts.activation)
    if parts.skip:
        raise refuse(NAME, "a skip connection", "Export to circuit-tracer")
    size, width, latents = len(set_.layers), set_.d_model, set_[0].latents
    found: dict[str, list[Tensor]] = {name: [] for name in _WEIGHTS}
    for layer in set_.layers:
        raw = fold(set_[layer]).single()
        threshold = torch.zeros(latents) if raw.threshold is None else raw.threshold
        found["W_enc"].append(raw.W_enc.T)
        found["b_enc"].append(raw.b_enc)
        # It stores logarithms: the smallest number that has one stands for a threshold of 0.
        found["log_threshold"].append(threshold.clamp_min(torch.finfo(torch.float32).tiny).log())
        found["W_dec"].extend(raw.W_dec.unbind(1))
        zeros = [torch.zeros(width)] * (len(set_.targets(layer)) - 1)
        found["b_dec"].extend([raw.b_dec, *zeros])
    tensors = {name: torch.stack(items).contiguous() for name, items in found.items()}
    tensors |= {name: torch.ones(size) for name in _SCALES}
    tensors["feature_count"] = torch.zeros(size, latents, dtype=torch.long)
    if set_.cross:
        sources = torch.triu_indices(size, size)[0]
        tensors["layer_mask"] = (sources == torch.arange(size)[:, None]).float()
    write_safetensors(tensors, folder / FILE)
    write_json(folder / CONFIG, _config_of(set_, model))


def _config_of(set_: TranscoderSet, model: str | None) -> dict[str, Any]:
    """Every field that its config requires; those of the training say nothing of this set."""
    spec = set_.card.spec if set_.card else None
    return {
        "device": "cpu",
        "dtype": "float32",
        "seed": 0,
        "model_name": model or "unknown",
        "d_in": set_.d_model,
        "d_latent": set_[0].latents,
        "n_layers": len(set_.layers),
        "jumprelu_bandwidth": spec.bandwidth if spec is not None else 1.0,
        "jumprelu_init_threshold": 0.03,
        "normalize_decoder": False,
        "dead_feature_window": 250,
        "cross_layer_decoders": set_.cross,
        "context_size": 1,
        "l0_coefficient": 0.0,
        "feature_sharding": False,
    }
