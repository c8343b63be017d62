"""The format of a file or folder, by its names and first bytes, so that no reader gets another's files."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from winnow.sae.formats.files import Kind, kind_of_file
from winnow.schemas.errors import ConfigError
from winnow.schemas.sets import CARD_KEY, WEIGHTS_KEY

LAYOUTS = {
    "openai": "a `.pt` state dict with encoder.weight, latent_bias and pre_bias",
    "saelens": "a folder with cfg.json and sae_weights.safetensors",
    "sparsify": "a folder with cfg.json and sae.safetensors",
    "dictionary_learning": "a folder with config.json and ae.pt",
    "gemma-scope": "params.npz with W_enc, b_enc, W_dec, b_dec and threshold, or params.safetensors or "
    "params_layer_N.safetensors with w_enc and w_dec in their place",
    "crosscoder": "a folder with config.json and model.safetensors, or a `.pt`, with encoder.weight of three "
    "axes",
    "llama-scope": "a folder with config.json and sae_weights.safetensors, or hyperparams.json and "
    "checkpoints/final.safetensors",
    "qwen-scope": "a `layerN.sae.pt` with W_enc, b_enc, W_dec and b_dec",
}
_FILES: dict[str, tuple[tuple[str, ...], ...]] = {
    "openai": (("autoencoder.pt",),),
    "saelens": (("cfg.json", "sae_weights.safetensors"),),
    "sparsify": (("cfg.json", "sae.safetensors"),),
    "dictionary_learning": (("config.json", "ae.pt"),),
    "gemma-scope": (("params.npz",), ("params.safetensors",), ("params_layer_0.safetensors",)),
    "crosscoder": (("config.json", "model.safetensors"),),
    "llama-scope": (
        ("config.json", "sae_weights.safetensors"),
        ("hyperparams.json", "checkpoints/final.safetensors"),
    ),
    "qwen-scope": (("layer*.sae.pt", "config.json"), ("layer*.sae.pt",)),
}
"""The files of a folder of each format: all of one of the tuples. `*` is any text."""
_NOBODYS = (Kind.LFS, Kind.MARKUP, Kind.EMPTY, Kind.GGUF)
"""Kinds that no importer reads, whatever the file's name is."""
OWN = (CARD_KEY, WEIGHTS_KEY)
_LONE = {
    "openai": (Kind.TORCH, Kind.PICKLE),
    "gemma-scope": (Kind.NPZ, Kind.SAFETENSORS, Kind.PICKLE),
    "qwen-scope": (Kind.TORCH, Kind.PICKLE),
    "crosscoder": (Kind.TORCH, Kind.PICKLE, Kind.SAFETENSORS),
    "llama-scope": (Kind.SAFETENSORS,),
}
"""Formats of one file, which may have any name; the reader itself says what is wrong with a pickle."""
# The kind belongs to the sign: W_enc, W_dec and threshold alone are dictionary_learning's and Gemma Scope's.
_SIGNS: tuple[tuple[str, Kind, set[str]], ...] = (
    ("openai", Kind.TORCH, {"encoder.weight", "latent_bias", "pre_bias"}),
    ("crosscoder", Kind.TORCH, {"encoder.weight", "decoder.weight", "code_normalization_id"}),
    ("dictionary_learning", Kind.TORCH, {"encoder.weight", "encoder.bias", "decoder.weight"}),
    ("dictionary_learning", Kind.TORCH, {"encoder.weight", "gate_bias", "decoder.weight"}),
    # Of an older version, which has nothing that dictionary_learning has not.
    ("crosscoder", Kind.TORCH, {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}),
    ("crosscoder", Kind.SAFETENSORS, {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}),
    ("llama-scope", Kind.SAFETENSORS, {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}),
    ("llama-scope", Kind.SAFETENSORS, {"W_E", "b_E", "W_D"}),
    ("dictionary_learning", Kind.TORCH, {"W_enc", "W_dec", "b_dec", "threshold"}),
    ("qwen-scope", Kind.TORCH, {"W_enc", "b_enc", "W_dec", "b_dec"}),
    ("gemma-scope", Kind.NPZ, {"W_enc", "W_dec", "threshold"}),
    ("gemma-scope", Kind.SAFETENSORS, {"w_enc", "w_dec", "threshold"}),
    ("saelens", Kind.SAFETENSORS, {"W_enc", "W_dec", "b_dec"}),
    ("sparsify", Kind.SAFETENSORS, {"encoder.weight", "encoder.bias", "W_dec"}),
)
"""Tensors by which the files of a format are recognised."""
SHOWN = 6
"""Tensors or folders named in a message."""


def require_format(path: Path, name: str) -> None:
    """Check that `path` may be of the format `name`.

    Raises:
        ConfigError: It is another format's, a folder of several SAEs, or nothing that an importer reads: the
            message says what it is and, if there is one, which `--from` reads it.
    """
    # The reader names the file that is missing.
    if not path.exists():
        return
    if path.is_dir():
        found = _formats_in(path)
        # A folder without any format's files passes: the reader's error names what it expected there.
        if name not in found:
            _refuse_folder(path, name, found)
        return
    kind = kind_of_file(path)
    # A file in a folder of a known format is what its folder says; only a lone one is judged by its tensors.
    if kind not in _NOBODYS:
        found = [
            other
            for other in _formats_in(path.parent)
            if any(fnmatch(path.name, name) for name in sum(_FILES[other], ()))
        ]
        if name in found:
            return
        if found:
            raise _other(path, f"a file of {LAYOUTS[found[0]]}", name, found[0])
    tensors = _tensors_of(path, kind)
    likely = [other for other, its_kind, some in _SIGNS if its_kind is kind and some <= set(tensors)]
    if kind in _LONE.get(name, ()) and (not likely or name in likely):
        return
    others = [other for other in likely if other != name]
    raise ConfigError(
        f"{path} is {kind.value}" + (f" of {_some(tensors)}" if tensors else ""),
        expected=f"{LAYOUTS[name]} (--from {name})",
        fix=f"--from {others[0]} reads such tensors: {LAYOUTS[others[0]]}" if others else None,
    )


def _refuse_folder(path: Path, name: str, found: list[str]) -> None:
    """Raise if a folder that is not of the format `name` holds another format's files, or several SAEs."""
    if found:
        raise _other(path, LAYOUTS[found[0]], name, found[0])
    if all((path / file).is_file() for file in OWN):
        raise ConfigError(
            f"{path} holds one of Winnow's own SAEs", fix="Use it as it is: every command reads it"
        )
    # Two levels down, as in `layer_9/width_16k`: enough to name one of them in the message.
    below = (p for depth in ("*", "*/*") for p in path.glob(depth))
    inner = sorted(p.relative_to(path).as_posix() for p in below if p.is_dir() and _formats_in(p))
    if inner:
        raise ConfigError(
            f"{path} holds {len(inner)} SAEs: {_some(inner)}",
            expected=f"{LAYOUTS[name]} (--from {name})",
            fix=f"Import one at a time, such as {path / inner[0]}",
        )


def _formats_in(folder: Path) -> list[str]:
    """The formats of whose files a folder has all."""

    def has(files: tuple[str, ...]) -> bool:
        return all(any(found.is_file() for found in folder.glob(file)) for file in files)

    return [name for name, choices in _FILES.items() if any(has(files) for files in choices)]


def _other(path: Path, what: str, asked: str, found: str) -> ConfigError:
    return ConfigError(
        f"{path} is {what}",
        expected=f"{LAYOUTS[asked]} (--from {asked})",
        fix=f"--from {found} reads it",
    )


def _tensors_of(path: Path, kind: Kind) -> list[str]:
    """Names of the tensors, without loading them; none if the file has none or is damaged."""
    # Only for a message, so errors are no errors here: the reader that follows reports the damage.
    try:
        if kind is Kind.SAFETENSORS:
            with safe_open(path, framework="pt") as file:
                return sorted(file.keys())
        if kind is Kind.NPZ:
            with zipfile.ZipFile(path) as file:
                return sorted(name.removesuffix(".npy") for name in file.namelist())
        if kind is Kind.TORCH:
            # Mapped: a file of gigabytes is looked at only to name the format.
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return sorted(map(str, found)) if isinstance(found, dict) else []
    except (SafetensorError, zipfile.BadZipFile, OSError, RuntimeError, ValueError, pickle.UnpicklingError):
        return []
    return []


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"
