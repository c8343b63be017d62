"""Resolves the name of a subject to its files: hub ids, folders, packages, GGUF; digests; the per-user cache.

Only safetensors are loaded (a pickle can run code). A GGUF file is converted once, exactly, into an
ordinary float32 folder in the cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock
import transformers
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError

from winnow.common.packages import is_package_uri, resolve_package
from winnow.common.paths import expand_user
from winnow.common.shared_files import write_whole
from winnow.schemas.base import sha256_hex
from winnow.schemas.errors import ConfigError, StoreError
from winnow.schemas.subject import SubjectIdentity, SubjectSpec
from winnow.subject.pretrained import convert, first_line, load_tokenizer, tokenizer_digest

log = logging.getLogger("winnow.subject")

CONVERSION = "v3"
"""Version of what a conversion writes; part of the cache key."""

# As strict as the hub's own: anything else is a mistyped path, for which no request is made.
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_INDEX = "model.safetensors.index.json"
# Not pickles, nor other frameworks' copies of the weights, which some repositories hold as well.
_WANTED = ("model*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


@dataclass(frozen=True)
class Located:
    """The files of a subject.

    Attributes:
        folder: A local folder that transformers loads: config, safetensors, tokenizer.
        weights: The files whose digest identifies the weights, in name order; for a GGUF, that file.
        revision: The hub commit, if there is one.
    """

    folder: Path
    weights: tuple[Path, ...]
    revision: str | None = None


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/winnow`, or `~/.cache/winnow`: the one place that reads this variable."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "winnow"


def locate(spec: SubjectSpec) -> Located:
    """Find the subject's files; fetch or convert them if necessary.

    Raises:
        ConfigError: There are none, the hub cannot be reached, or the weights are pickles.
        DependencyMissing: `package://` names a distribution that is not installed.
        StoreError: The cache cannot be written.
    """
    if is_package_uri(spec.model):
        paths = resolve_package(spec.model)
        if len(paths) != 1 or paths[0].suffix != ".gguf":
            raise ConfigError(
                f"subject.model {spec.model!r}",
                expected="exactly one .gguf file",
                got=", ".join(path.name for path in paths[:5]),
            )
        path = paths[0]
    else:
        path = expand_user(spec.model)
    if path.is_file() and path.suffix == ".gguf":
        path = path.resolve()
        return Located(convert_gguf(path), (path,))
    if path.is_dir():
        return Located(path, weight_files(path))
    if path.suffix == ".gguf" or not _HUB_ID.match(spec.model):
        raise ConfigError(
            f"subject.model {spec.model!r} does not exist",
            expected="a folder, a .gguf file, package://DIST/FILE.gguf or a hub id",
            fix="Check the path",
        )
    folder = _fetch(spec)
    # The hub's cache names the folder of a snapshot by its commit, which a branch or tag resolves to.
    return Located(folder, weight_files(folder), folder.name if folder.parent.name == "snapshots" else None)


def has_planned_files(spec: SubjectSpec, planned: SubjectIdentity) -> bool:
    """Whether the local files that `spec` names are `planned`'s, by the digests of weights and tokenizer.

    False for a hub id, whose files would have to be fetched first.

    Raises:
        ConfigError, DependencyMissing, StoreError: As for `locate` and `load_tokenizer`.
    """
    path = expand_user(spec.model)
    if path.suffix == ".gguf" and path.is_file():
        if digest_files([path.resolve()]) != planned.weights_sha256:
            return False  # known without a conversion
    elif not path.is_dir() and not is_package_uri(spec.model):
        return False
    located = locate(spec)
    if digest_files(located.weights) != planned.weights_sha256:
        return False
    return tokenizer_digest(load_tokenizer(located.folder, spec)) == planned.tokenizer_sha256


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a model folder, in name order.

    Raises:
        ConfigError: There are none (pickles are refused), or the index names files outside the folder.
    """
    if (folder / "model.safetensors").is_file():
        return (folder / "model.safetensors",)
    if (folder / _INDEX).is_file():
        try:
            names = sorted(
                set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(f"{folder / _INDEX} is not a safetensors index", got=str(error)) from error
        files = tuple(folder / name for name in names)
        # An index is input from elsewhere: a name such as `../other.safetensors` must not leave the folder
        # (P6).
        missing = [file.name for file in files if file.parent != folder or not file.is_file()]
        if missing or not files:
            raise ConfigError(f"{folder} lacks weight files that its index names", got=", ".join(missing[:5]))
        return files
    pickles = [file.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(kind)]
    raise ConfigError(
        f"subject folder {folder} holds no model.safetensors",
        expected="safetensors weights",
        got=f"pickle weights ({', '.join(pickles[:3])}), which can run code and are refused"
        if pickles
        else "no weights",
        fix="Load the model in an environment you trust and save it with "
        "`save_pretrained(folder, safe_serialization=True)`"
        if pickles
        else "Give a folder with config.json, model.safetensors and tokenizer.json",
    )


def digest_files(paths: Sequence[Path]) -> str:
    """SHA-256 of the files' bytes one after the other (`cat A B | sha256sum`), remembered in the cache."""
    # Keyed by path, size, modification time, and change time, which a program cannot set as it can the
    # former. Remembered, since every worker needs it and weights are many GB; only a shortcut, so a cache
    # that cannot be written is no error.
    stats = [(str(path.resolve()), path.stat()) for path in paths]
    facts = [[name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats]
    memory = cache_dir() / "digests" / sha256_hex(json.dumps(facts).encode())
    try:
        known = memory.read_text(encoding="ascii")
        # A file that was cut off while it was written is computed again.
        if re.fullmatch("[0-9a-f]{64}", known):
            return known
    except (OSError, ValueError):
        pass
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    try:
        write_whole(memory, digest.hexdigest().encode())
    except OSError as error:
        log.info("the digest of %s is not remembered: %s", paths[0].name, error)
    return digest.hexdigest()


def convert_gguf(path: Path) -> Path:
    """An ordinary folder with the weights of a GGUF file, dequantised to float32; converted once.

    Processes that convert at the same time wait for one of them.

    Args:
        path: A `.gguf` file of an architecture that transformers can read.

    Returns:
        `cache_dir()/gguf/<sha256 of the file>-<CONVERSION>`.

    Raises:
        ConfigError: The file cannot be read as a model.
        StoreError: The cache cannot be written.
    """
    # float32, because it is exact: at Q4_1, 42 % of the weights change when rounded to float16.
    sha256 = digest_files([path])
    target = cache_dir() / "gguf" / f"{sha256}-{CONVERSION}"
    if target.is_dir():
        return target
    scratch = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(target.with_name(f".{target.name}.lock")):
            if target.is_dir():  # again: whoever held the lock before has made it
                return target
            shutil.rmtree(scratch, ignore_errors=True)  # left by a process that died; we hold the lock
            log.info("converting %s to safetensors in %s (once)", path.name, target)
            try:
                convert(path, scratch)
                facts = {"file": path.name, "sha256": sha256, "transformers": transformers.__version__}
                (scratch / "source.json").write_text(json.dumps(facts), encoding="utf-8")
                # Flushed before the rename: after a loss of power the final name must not hold empty files.
                _flush(scratch)
                scratch.rename(target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"the converted weights of {path.name} cannot be written to {target.parent}",
            got=str(error),
            fix="Free some space (float32 weights: 4 bytes per parameter) or set XDG_CACHE_HOME",
        ) from error
    return target


def _fetch(spec: SubjectSpec) -> Path:
    import huggingface_hub

    # Code is not even fetched unless the config trusts it.
    wanted = (*_WANTED, "*.py") if spec.trust_remote_code else _WANTED
    try:
        return Path(
            huggingface_hub.snapshot_download(spec.model, revision=spec.revision, allow_patterns=list(wanted))
        )
    except (OSError, HFValidationError, ValueError) as error:
        raise ConfigError(
            f"subject.model {spec.model!r} is no local folder and could not be fetched from the hub",
            expected="a hub id that can be reached, or is in the hub's cache",
            got=first_line(error),
            fix="Check the name, the revision and the network (and HF_TOKEN for a gated model), or "
            "download it elsewhere and give its folder",
        ) from error


def _flush(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
