"""Reading a run's YAML config, with `--set` applied."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from winnow.common.yaml_text import parse_value, parse_yaml
from winnow.schemas.base import validate
from winnow.schemas.config import Config
from winnow.schemas.errors import ConfigError

T = TypeVar("T")


def load_config(path: str | Path, sets: Sequence[str] = ()) -> Config:
    """Read a YAML config and apply `--set dotted.key=value` overrides.

    Args:
        path: The file.
        sets: Overrides; each value is YAML (`null`, `8`, `[a, b]`, `text`), the last one wins.

    Raises:
        ConfigError: No such file, not YAML, a duplicate key, or invalid fields.
    """
    where = f"config {path}"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            where, expected="a readable YAML file", got=error.strerror, fix="Give its path"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(where, expected="YAML in UTF-8", got=str(error)) from error
    return parse_config(text, where, sets)


def parse_config(text: str, where: str, sets: Sequence[str] = ()) -> Config:
    """Parse a config from its text; `where` names it in messages. Otherwise as `load_config`."""
    raw, lines = parse_yaml(text, where)
    if not isinstance(raw, dict):
        raise ConfigError(where, expected="a mapping of sections", got=type(raw).__name__)
    tree = cast("dict[str, Any]", raw)
    for item in sets:
        # An overridden value has no line in the file any more: messages must not point to the old one.
        changed = _override(tree, item)
        lines = {place: line for place, line in lines.items() if place[: len(changed)] != changed}
    # After the overrides: a file may be invalid by itself and completed by `--set`.
    return validate(Config, tree, origin=where, lines=lines)


def _override(tree: dict[str, Any], item: str) -> tuple[str | int, ...]:
    """Apply the override `item`; returns the path of the value that it changed."""
    dotted, equals, text = item.partition("=")
    if not equals or not dotted:
        raise ConfigError("--set", expected="dotted.key=value", got=repr(item))
    value = parse_value(text, f"--set {dotted}")
    *parents, leaf = dotted.split(".")
    node: Any = tree
    changed: list[str | int] = []
    for part in parents:
        inner: Any = _child(node, part)
        if not isinstance(inner, (dict, list)):
            raise ConfigError(f"--set {dotted}", expected=f"{part} to be a section", got=repr(inner))
        changed.append(int(part) if isinstance(node, list) else part)
        node = cast("Any", inner)
    if isinstance(node, list):
        items = cast("list[Any]", node)
        items[_index(items, leaf)] = value
        return (*changed, int(leaf))
    node[leaf] = value
    return (*changed, leaf)


def _child(node: Any, part: str) -> Any:
    """Return the value at `part` of `node`; an absent section is created."""
    if isinstance(node, list):
        items = cast("list[Any]", node)
        return items[_index(items, part)]
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _index(items: list[Any], part: str) -> int:
    if not part.isdecimal() or int(part) >= len(items):
        raise ConfigError(f"--set ...{part}", expected=f"a list index below {len(items)}", got=repr(part))
    return int(part)
