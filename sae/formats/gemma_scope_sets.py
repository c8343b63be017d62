"""Gemma Scope 2's transcoders of all layers and its cross-layer transcoders, read as sets.

Legend: L layers, N latents, D width.

One safetensors file a layer, of w_enc [D, N], w_dec, b_enc, b_dec, threshold and, if there is a skip,
affine_skip_connection [D, D] (``x @ affine_skip_connection``). A transcoder's w_dec is [N, D]; a cross-layer
transcoder's is [N, L, D], of which only the layers from its own on are used. Layers are told by the names:
the files are called `...layer_{l}.safetensors`, or lie in folders `layer_{l}...`.

All latents read what the MLP is given, `pre_feedforward_layernorm`'s output, and predict what is added to the
stream.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from winnow.sae.formats.fields import refuse_tensors, unknown_fields
from winnow.sae.formats.files import read_json, read_safetensors, take
from winnow.sae.formats.gemma_scope import CONFIG, SECOND_FILE
from winnow.sae.formats.gemma_scope_cross import FIELDS
from winnow.sae.formats.raw import RawLayer, RawSet
from winnow.schemas.errors import ConfigError, IntegrityError
from winnow.schemas.layers import Reads, SetSpec

NAME = "gemma-scope-2"
_FILE = re.compile(r"(?:.*_)?layer_(\d+)\.safetensors")
_FOLDER = re.compile(r"layer_(\d+)(?:_.*)?")
_SKIP = "affine_skip_connection"
# A published cross-layer transcoder says `layers.{all}`.
_IN = re.compile(r".*layers\.(?:\d+|\{all\})\.pre_feedforward_layernorm\.output")
_OUT = re.compile(r".*layers\.(?:\d+|\{all\})\.post_feedforward_layernorm\.output")
SHOWN = 3


def read(path: Path, reads: Reads | None = None) -> RawSet:
    """Read the folder; `reads` overrides that the MLP's input is read."""
    files = _files(path)
    first, last = min(files), max(files)
    W_dec = take(read_safetensors(files[first]), "w_dec", files[first])
    cross = W_dec.ndim == 3
    # One layer's own decoders say how many layers there are, so a missing last file is noticed.
    if cross and W_dec.shape[1] != len(files):
        raise ConfigError(f"the layers in {path}", expected=f"{W_dec.shape[1]} files", got=len(files))
    config = _config(files[first])
    of = SetSpec(layers=(first, last), cross=cross, reads=reads or _reads(files[first], config))
    notes = unknown_fields(config, FIELDS, files[first].with_name(CONFIG))
    return RawSet(of, "jumprelu", partial(_read, files, cross), notes=notes)


def _files(path: Path) -> dict[int, Path]:
    """Layer -> its file; every layer of a range."""
    if not path.is_dir():
        raise ConfigError(
            f"{path} is not a folder",
            expected="the folder of all layers",
            fix="Import one layer --from gemma-scope",
        )
    found: dict[int, list[Path]] = {}
    for entry in sorted(path.iterdir()):
        if (match := _FILE.fullmatch(entry.name)) and entry.is_file():
            found.setdefault(int(match[1]), []).append(entry)
        elif (match := _FOLDER.fullmatch(entry.name)) and (entry / SECOND_FILE).is_file():
            found.setdefault(int(match[1]), []).append(entry / SECOND_FILE)
    for layer, files in found.items():
        if len(files) > 1:
            names = ", ".join(str(file.relative_to(path)) for file in files[:SHOWN])
            raise ConfigError(
                f"layer {layer} in {path}",
                expected="one file a layer",
                got=names,
                fix="Put the layers of one width and sparsity into a folder of their own",
            )
    numbers = sorted(found)
    if not numbers or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise ConfigError(
            f"the layers in {path}",
            expected="files ...layer_L.safetensors, or folders layer_L..., of every layer of a range",
            got=numbers or "none",
        )
    return {layer: files[0] for layer, files in found.items()}


def _config(file: Path) -> dict[str, Any]:
    origin = file.with_name(CONFIG)
    config = read_json(origin) if origin.is_file() else {}
    if (architecture := config.get("architecture", "jump_relu")) != "jump_relu":
        raise ConfigError(f"{origin}: architecture", expected="jump_relu", got=architecture)
    if config.get("type") == "crosscoder":
        raise ConfigError(
            f"{origin}: type",
            expected="transcoders",
            got="crosscoder",
            fix="Import it --from gemma-scope",
        )
    return config


def _reads(file: Path, config: dict[str, Any]) -> Reads:
    points = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    for point, pattern in zip(points, (_IN, _OUT), strict=True):
        # A list is that of a cross-layer transcoder: one place a layer.
        for name in point if isinstance(point, list) else [point]:
            if name is not None and not pattern.fullmatch(str(name)):
                raise ConfigError(
                    f"{file.with_name(CONFIG)}: a hook point",
                    expected="the outputs of pre_feedforward_layernorm and post_feedforward_layernorm",
                    got=name,
                )
    return "mlp_in"


def _read(files: dict[int, Path], cross: bool, layer: int) -> RawLayer:
    path = files[layer]
    tensors = read_safetensors(path)
    refuse_tensors(tensors, {"w_enc", "w_dec", "b_enc", "b_dec", "threshold", _SKIP}, path)
    W_dec = take(tensors, "w_dec", path)
    if W_dec.ndim != (3 if cross else 2):
        raise IntegrityError(f"{path}: w_dec", expected=f"{3 if cross else 2} axes", got=tuple(W_dec.shape))
    return RawLayer(
        W_enc=take(tensors, "w_enc", path).T,
        b_enc=take(tensors, "b_enc", path),
        # Decoders to earlier layers are in the file, and nothing reads them.
        W_dec=W_dec[:, layer - min(files) :] if cross else W_dec[:, None],
        b_dec=take(tensors, "b_dec", path),
        threshold=take(tensors, "threshold", path),
        W_skip=take(tensors, _SKIP, path).T if _SKIP in tensors else None,
    )
