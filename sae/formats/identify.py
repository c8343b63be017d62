"""What a file or folder holds, by its names and its first bytes: no file is taken for another format's."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from winnow.sae.formats.files import Kind, kind_of_file
from winnow.schemas.errors import ConfigError

LAYOUTS = {
    "openai": "a `.pt` state dict with encoder.weight, latent_bias and pre_bias",
    "saelens": "a folder with cfg.json and sae_weights.safetensors",
    "sparsify": "a folder with cfg.json and sae.safetensors",
    "dictionary_learning": "a folder with config.json and ae.pt",
    "gemma-scope": "params.npz or params.safetensors with W_enc, b_enc, W_dec, b_dec and threshold",
}
FILES: dict[str, tuple[tuple[str, ...], ...]] = {
    "openai": (("autoencoder.pt",),),
    "saelens": (("cfg.json", "sae_weights.safetensors"),),
    "sparsify": (("cfg.json", "sae.safetensors"),),
    "dictionary_learning": (("config.json", "ae.pt"),),
    "gemma-scope": (("params.npz",), ("params.safetensors",)),
}
"""What a folder of each format holds: all the files of one of these."""
NOBODYS = (Kind.LFS, Kind.MARKUP, Kind.EMPTY, Kind.GGUF)
"""Whatever such a file is called."""
OWN = ("sae.json", "sae.safetensors")
LONE = {"openai": (Kind.TORCH, Kind.PICKLE), "gemma-scope": (Kind.NPZ, Kind.SAFETENSORS, Kind.PICKLE)}
"""Formats that are one file, under any name; the reader itself says what is wrong with a pickle."""
SIGNS: tuple[tuple[str, Kind, set[str]], ...] = (
    ("openai", Kind.TORCH, {"encoder.weight", "latent_bias", "pre_bias"}),
    ("dictionary_learning", Kind.TORCH, {"encoder.weight", "encoder.bias", "decoder.weight"}),
    ("dictionary_learning", Kind.TORCH, {"W_enc", "W_dec", "b_dec", "threshold"}),
    ("gemma-scope", Kind.NPZ, {"W_enc", "W_dec", "threshold"}),
    ("gemma-scope", Kind.SAFETENSORS, {"w_enc", "w_dec", "threshold"}),
    ("saelens", Kind.SAFETENSORS, {"W_enc", "W_dec", "b_dec"}),
    ("sparsify", Kind.SAFETENSORS, {"encoder.weight", "encoder.bias", "W_dec"}),
)
"""What tells the tensors of a format's files from the others'."""
SHOWN = 6
"""Tensors or folders named in a message."""


def require_format(path: Path, name: str) -> None:
    """Return where `path` may be of the format `name`.

    Raises:
        ConfigError: It is another format's, a folder of several SAEs, or nothing an importer reads: the
            message says what it is and, where one does, which `--from` reads it.
    """
    if not path.exists():
        return  # the reader names the file that it misses
    if path.is_dir():
        found = _formats_in(path)
        if name not in found:
            _refuse_folder(path, name, found)
        return
    kind = kind_of_file(path)
    if kind not in NOBODYS:
        found = [other for other in _formats_in(path.parent) if path.name in sum(FILES[other], ())]
        if name in found:
            return
        if found:
            raise _other(path, f"a file of {LAYOUTS[found[0]]}", name, found[0])
    tensors = _tensors_of(path, kind)
    likely = [other for other, its_kind, some in SIGNS if its_kind is kind and some <= set(tensors)]
    if kind in LONE.get(name, ()) and (not likely or name in likely):
        return
    others = [other for other in likely if other != name]
    raise ConfigError(
        f"{path} is {kind.value}" + (f" of {_some(tensors)}" if tensors else ""),
        expected=f"{LAYOUTS[name]} (--from {name})",
        fix=f"--from {others[0]} reads such tensors: {LAYOUTS[others[0]]}" if others else None,
    )


def _refuse_folder(path: Path, name: str, found: list[str]) -> None:
    if found:
        raise _other(path, LAYOUTS[found[0]], name, found[0])
    if all((path / file).is_file() for file in OWN):
        raise ConfigError(
            f"{path} holds one of Winnow's own SAEs", fix="Use it as it is: every command reads it"
        )
    below = (p for depth in ("*", "*/*") for p in path.glob(depth))
    inner = sorted(p.relative_to(path).as_posix() for p in below if p.is_dir() and _formats_in(p))
    if inner:
        raise ConfigError(
            f"{path} holds {len(inner)} SAEs: {_some(inner)}",
            expected=f"{LAYOUTS[name]} (--from {name})",
            fix=f"Import one at a time, such as {path / inner[0]}",
        )


def _formats_in(folder: Path) -> list[str]:
    def has(files: tuple[str, ...]) -> bool:
        return all((folder / file).is_file() for file in files)

    return [name for name, choices in FILES.items() if any(has(files) for files in choices)]


def _other(path: Path, what: str, asked: str, found: str) -> ConfigError:
    return ConfigError(
        f"{path} is {what}",
        expected=f"{LAYOUTS[asked]} (--from {asked})",
        fix=f"--from {found} reads it",
    )


def _tensors_of(path: Path, kind: Kind) -> list[str]:
    """Names of the tensors, without loading them; none where the file has none or is damaged."""
    try:
        if kind is Kind.SAFETENSORS:
            with safe_open(path, framework="pt") as file:
                return sorted(file.keys())
        if kind is Kind.NPZ:
            with zipfile.ZipFile(path) as file:
                return sorted(name.removesuffix(".npy") for name in file.namelist())
        if kind is Kind.TORCH:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return sorted(map(str, found)) if isinstance(found, dict) else []
    except (SafetensorError, zipfile.BadZipFile, OSError, RuntimeError, ValueError, pickle.UnpicklingError):
        return []
    return []


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"
