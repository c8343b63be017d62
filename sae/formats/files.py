"""Reading and writing the files of other libraries, without running anything they contain."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from winnow.schemas.errors import ConfigError, IntegrityError


class Kind(Enum):
    """Kinds of files by their first bytes, in words for messages."""

    TORCH = "a torch file"
    NPZ = "an npz"
    NPY = "a single array (.npy)"
    PICKLE = "a pickle"
    SAFETENSORS = "a safetensors file"
    GGUF = "a GGUF, a language model's weights"
    # A clone without Git LFS leaves a pointer under the file's name, a failed download a web page.
    LFS = "a pointer of Git LFS, not the file itself (`git lfs pull` fetches it)"
    JSON = "JSON"
    MARKUP = "a web page, not the file itself"
    EMPTY = "empty"
    OTHER = "of a kind that no importer reads"


def kind_of_file(path: Path) -> Kind:
    """The kind of a file by its first bytes and the names in a zip; nothing is loaded."""
    with path.open("rb") as file:
        head = file.read(64)
    # torch files and npz files are both zips: the names inside tell them apart.
    if head.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except zipfile.BadZipFile:
            return Kind.OTHER
        if any(name.endswith("data.pkl") for name in names):
            return Kind.TORCH
        return Kind.NPZ if names and all(name.endswith(".npy") for name in names) else Kind.OTHER
    starts = {
        b"\x80": Kind.PICKLE,
        b"\x93NUMPY": Kind.NPY,
        b"GGUF": Kind.GGUF,
        b"version https://git-lfs": Kind.LFS,
        b"{": Kind.JSON,
        b"<": Kind.MARKUP,
    }
    # safetensors has no magic number: 8 bytes of header length, then a JSON header. Before `{`, since a
    # length may begin with any byte.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size:
        return Kind.SAFETENSORS
    kind = next((kind for start, kind in starts.items() if head.lstrip().startswith(start)), Kind.OTHER)
    return kind if head else Kind.EMPTY


def require(path: Path) -> Path:
    """Return `path` if it is a file.

    Raises:
        ConfigError: It is not.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is not there", fix="Give the file or folder that the other library wrote")
    return path


def folder_of(path: Path) -> Path:
    """Return a folder, or the folder of a file."""
    # People name the weights file as often as the folder that the library wrote.
    return path.parent if path.is_file() else path


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConfigError: There is no such file.
        IntegrityError: It holds no JSON object.
    """
    require(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise IntegrityError(f"{path} is not JSON", got=error) from error
    if not isinstance(found, dict):
        raise IntegrityError(f"{path}", expected="a JSON object", got=type(found).__name__)
    return found


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, indented."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Raises:
        ConfigError: There is no such file.
        IntegrityError: It is damaged or of another kind.
    """
    # `OTHER` too: a damaged header looks like nothing, and the parser says what is wrong with it.
    _require_kind(path, Kind.SAFETENSORS, Kind.OTHER)
    try:
        return safetensors.torch.load(path.read_bytes())
    except SafetensorError as error:
        raise IntegrityError(f"{path} is not safetensors", got=error) from error


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a file with the mode that any new file has."""
    # safetensors 0.8 makes files that only their owner can read: colleagues on a shared disk could not
    path.touch()
    mode = path.stat().st_mode
    safetensors.torch.save_file(tensors, path, metadata)
    path.chmod(mode)


def read_pt(path: Path) -> dict[str, Any]:
    """Read the state dict of a torch file with torch's weights-only reader.

    Raises:
        ConfigError: It holds more than tensors and plain values: loading it would run its code.
        IntegrityError: It is not a torch file.
    """
    _require_kind(path, Kind.TORCH, Kind.PICKLE)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Our own message: torch's goes on to advise `weights_only=False`, which runs the code.
        named = re.search(r"GLOBAL:? (\S+)", str(error))
        raise ConfigError(
            f"{path} would run code when it is loaded",
            expected="a state dict of tensors and plain values",
            got=named.group(1) if named else "a pickle that torch's weights-only reader refuses",
            fix="Have its author save `state_dict()`; Winnow never loads a pickle",
        ) from error
    # The kinds of error that torch raises on files that were cut off or have changed bytes.
    except (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise IntegrityError(f"{path} is not a torch file", got=" ".join(str(error).split())[:200]) from error
    if not isinstance(found, dict):
        raise IntegrityError(f"{path}", expected="a state dict", got=type(found).__name__)
    return found


def read_npz(path: Path) -> dict[str, Tensor]:
    """Read all arrays of an npz file.

    Raises:
        ConfigError: It holds Python objects: loading them would run their code.
        IntegrityError: It is not an npz file.
    """
    _require_kind(path, Kind.NPZ, Kind.PICKLE)
    try:
        with np.load(path, allow_pickle=False) as data:
            # Arrays are read when they are indexed: here, where the errors of damaged ones are caught.
            return {name: torch.from_numpy(np.array(data[name])) for name in data.files}
    except ValueError as error:
        raise ConfigError(
            f"{path} would run code when it is loaded",
            expected="an npz of arrays of numbers",
            got=error,
            fix="Winnow never loads a pickle",
        ) from error
    except (OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise IntegrityError(f"{path} is not an npz of numbers", got=error) from error


def _require_kind(path: Path, kind: Kind, suspect: Kind) -> None:
    """Check the kind of a file; a `suspect` one passes, since the reader itself tells what is wrong with it.

    Raises:
        IntegrityError: It is of another kind.
    """
    found = kind_of_file(require(path))
    if found not in (kind, suspect):
        raise IntegrityError(f"{path}", expected=kind.value, got=found.value)


def take(tensors: Mapping[str, Any], name: str, origin: Path) -> Tensor:
    """Return a tensor in single precision.

    Raises:
        IntegrityError: It is missing.
    """
    # In float32 whatever the file has: Winnow stores SAEs so, and folding needs the digits.
    tensor = tensors.get(name)
    if not isinstance(tensor, Tensor):
        raise IntegrityError(f"{origin} has no tensor {name!r}", got=", ".join(sorted(map(str, tensors))))
    return tensor.detach().float()


def take_matrix(tensors: Mapping[str, Any], name: str, origin: Path) -> Tensor:
    """Return a tensor of two axes in single precision.

    Raises:
        IntegrityError: It is missing, or has another number of axes.
    """
    # Before it is transposed: torch only warns of the transpose of anything but a matrix.
    tensor = take(tensors, name, origin)
    if tensor.ndim != 2:
        raise IntegrityError(f"{origin}: {name}", expected="a matrix", got=f"shape {tuple(tensor.shape)}")
    return tensor


def refuse(format_name: str, what: str, fix: str) -> ConfigError:
    """The error for an SAE that a format cannot hold, for the caller to raise."""
    return ConfigError(f"{format_name} cannot hold {what}", fix=fix)
