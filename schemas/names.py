"""Winnow's import names are plain words: a file of the user's with the same name must not be taken for ours.

`check` runs when any of the packages is first imported; commands that are started with `python -m` leave the
working directory out of the search before that, and Ray's workers are given none that hides a package.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from winnow.schemas.errors import ConfigError

PACKAGES = ("schemas", "store", "harvester", "trainer", "evaluator", "explorer")
HOME = Path(__file__).resolve().parents[1]
"""The folder that holds them."""


def check() -> None:
    """ConfigError where another file would be imported under one of the names."""
    for name in PACKAGES:
        found = _found(name)
        if found is not None and found != HOME / name:
            raise _taken(name, found)


def hidden_by(folder: Path) -> Path | None:
    """What in `folder` would be imported instead of a package of ours, were it searched first."""
    if folder.resolve() == HOME:
        return None
    for name in PACKAGES:
        spec = PathFinder.find_spec(name, [str(folder)])
        if spec is not None and spec.origin is not None:
            return Path(spec.origin)
    return None


def _found(name: str) -> Path | None:
    """The package folder, or the file, that `import name` gives; None where there is none."""
    module = sys.modules.get(name)
    spec = module.__spec__ if module is not None else find_spec(name)
    if spec is None:
        return None
    places = list(spec.submodule_search_locations or ()) or [spec.origin or ""]
    return Path(places[0]).resolve()


def _taken(name: str, found: Path) -> ConfigError:
    return ConfigError(
        f"{found} would be imported as Winnow's own package {name!r}",
        expected=HOME / name,
        got=found,
        fix="Rename it, start the command from another folder, or take that folder off PYTHONPATH",
    )
