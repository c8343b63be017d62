"""Reading and writing the files of other libraries, without ever running what is in them."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from schemas.errors import ConfigError, IntegrityError


def require(path: Path) -> Path:
    """`path`, which must be a file."""
    if not path.is_file():
        raise ConfigError(f"{path} is not there", fix="Give the file or folder that the other library wrote")
    return path


def folder_of(path: Path) -> Path:
    """`path`, or the folder it lies in where it is one of an SAE's files."""
    return path.parent if path.is_file() else path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    require(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise IntegrityError(f"{path} is not JSON", got=error) from error
    if not isinstance(found, dict):
        raise IntegrityError(f"{path}", expected="a JSON object", got=type(found).__name__)
    return found


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON object, indented."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file."""
    require(path)
    try:
        return safetensors.torch.load(path.read_bytes())
    except SafetensorError as error:
        raise IntegrityError(f"{path} is not safetensors", got=error) from error


def read_pt(path: Path) -> dict[str, Any]:
    """The state dict of a torch file, by torch's weights-only reader.

    Raises:
        ConfigError: It holds more than tensors and plain values: loading it would run its code.
        IntegrityError: It is no torch file.
    """
    require(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message goes on to say how to load it all the same
        named = re.search(r"GLOBAL:? (\S+)", str(error))
        raise ConfigError(
            f"{path} wants to run code when it is loaded",
            expected="a state dict of tensors and plain values",
            got=named.group(1) if named else "a pickle that torch's weights-only reader refuses",
            fix="Have its author save `state_dict()`; Winnow never loads a pickle",
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise IntegrityError(f"{path} is not a torch file", got=" ".join(str(error).split())[:200]) from error
    if not isinstance(found, dict):
        raise IntegrityError(f"{path}", expected="a state dict", got=type(found).__name__)
    return found


def read_npz(path: Path) -> dict[str, Tensor]:
    """Every array of an npz file.

    Raises:
        ConfigError: It holds Python objects: loading them would run their code.
        IntegrityError: It is no npz file.
    """
    require(path)
    try:
        with np.load(path, allow_pickle=False) as data:
            return {name: torch.from_numpy(np.array(data[name])) for name in data.files}
    except ValueError as error:
        raise ConfigError(
            f"{path} wants to run code when it is loaded",
            expected="an npz of arrays of numbers",
            got=error,
            fix="Winnow never loads a pickle",
        ) from error
    except (OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise IntegrityError(f"{path} is not an npz of numbers", got=error) from error


def take(tensors: Mapping[str, Any], name: str, origin: Path) -> Tensor:
    """A tensor that must be there, in single precision."""
    tensor = tensors.get(name)
    if not isinstance(tensor, Tensor):
        raise IntegrityError(f"{origin} has no tensor {name!r}", got=", ".join(sorted(map(str, tensors))))
    return tensor.detach().float()


def refuse(format_name: str, what: str, fix: str) -> ConfigError:
    """Why an SAE cannot be held by a format."""
    return ConfigError(f"{format_name} cannot hold {what}", fix=fix)
