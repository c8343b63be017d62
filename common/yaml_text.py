"""YAML with the scalars of version 1.2, and without its ambiguities.

Duplicate keys, numbers with leading zeros and Python's `None` are refused.
"""

from __future__ import annotations

import re
from typing import Any, cast

import yaml

from winnow.schemas.errors import ConfigError

Path = tuple[str | int, ...]
"""Keys and list indices from the top of a document to a value in it."""

_TAG = "tag:yaml.org,2002:"
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2."""

    # PyYAML reads YAML 1.1: `no` is false, `1e-3` text, `010` 8, `1:30` 90, `2026-01-01` a date. Without its
    # resolvers, those below are the only ones. (A true-or-false field still takes the text `no`.)
    yaml_implicit_resolvers = {}


for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+|0b[01]+)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    _add = cast(Any, _Loader).add_implicit_resolver
    _add(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), _first)


def parse_yaml(text: str, where: str) -> tuple[Any, dict[Path, int]]:
    """Parse one YAML document; returns it with the line (from 1) at which each value begins.

    Args:
        text: The document.
        where: Name of the document in messages.

    Raises:
        ConfigError: Not YAML, a duplicate key, or a value that YAML readers understand differently.
    """
    try:
        loader: Any = _Loader(text)
    # Of characters that YAML does not allow, such as NUL; a reader that fails so has nothing to dispose of.
    except yaml.YAMLError as error:
        raise ConfigError(where, expected="YAML", got=" ".join(str(error).split())) from error
    try:
        node = loader.get_single_node()
        lines: dict[Path, int] = {}
        if node is None:
            return None, lines
        # Before construction, which knows no lines any more and lets the last of two equal keys win.
        _walk(loader, node, (), lines, set(), where)
        return loader.construct_document(node), lines
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):  # ours, from `_walk`: it is a ValueError too
            raise
        raise ConfigError(where, expected="YAML", got=" ".join(str(error).split())) from error
    finally:
        loader.dispose()


def parse_value(text: str, where: str) -> Any:
    """Parse the value after `--set key=`: YAML on one line, all of it.

    Raises:
        ConfigError: As `parse_yaml`, or the value contains a comment, which YAML would ignore.
    """
    quoted = "'" + text.replace("'", "''") + "'"
    fix = f'Quote it for YAML and for the shell, if it is text: {where}="{quoted}"'
    # Of these YAML would take a part only (`&name dir`, `--- dir`), or another line than was written.
    if re.match(r"\s*(&|---)", text) or re.search("[\n\r\x85]", text.strip()):
        raise ConfigError(where, expected="a YAML value on one line", got=repr(text), fix=fix)
    try:
        value, _ = parse_yaml(text, where)
    except ConfigError as error:
        # What names begin with in file systems and patterns, YAML reserves: `*.txt`, `[1].txt`, `@x`.
        if isinstance(error.__cause__, yaml.YAMLError):
            raise ConfigError(where, expected="a YAML value", got=repr(text), fix=fix) from error
        raise
    # `--set subject.model=org/name #2` would otherwise be taken without its end, and without a word.
    node = yaml.compose(text, Loader=_Loader)
    if text[node.end_mark.index if node else 0 :].strip():
        raise ConfigError(where, expected="a YAML value", got=f"a comment in {text!r}", fix=fix)
    return value


def _walk(loader: Any, node: Any, path: Path, lines: dict[Path, int], seen: set[int], where: str) -> None:
    """Record the line of each value of `node`; refuse what is ambiguous."""
    line = node.start_mark.line + 1
    lines[path] = line
    if id(node) in seen:  # an alias: its anchor was checked, and may contain the alias itself
        return
    seen.add(id(node))
    _check_tag(loader, node, where)
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node, f"{where}, line {line}")
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(cast("list[Any]", node.value)):
            _walk(loader, item, (*path, index), lines, seen, where)
    else:
        first: dict[tuple[str, str], int] = {}
        for key, value in cast("list[tuple[Any, Any]]", node.value):
            _check_tag(loader, key, where)
            name = str(key.value)
            if (key.tag, name) in first:
                raise ConfigError(
                    f"{where}, line {key.start_mark.line + 1}",
                    expected="each key once",
                    got=f"{'.'.join(map(str, (*path, name)))} again, after line {first[key.tag, name]}",
                    fix="Keep one of the two",
                )
            first[key.tag, name] = key.start_mark.line + 1
            _walk(loader, value, (*path, name), lines, seen, where)


def _check_tag(loader: Any, node: Any, where: str) -> None:
    # `!!int '010'` is 8, `!!float 1:30` is 90, and `!!timestamp x` an AttributeError.
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    untagged = loader.resolve(type(node), node.value, (plain, not plain))
    if node.tag not in (untagged, _TAG + "str"):
        raise ConfigError(
            f"{where}, line {node.start_mark.line + 1}",
            expected="a value without a tag, or with !!str",
            got=node.tag.replace(_TAG, "!!"),
            fix="Leave the tag out",
        )


def _check_scalar(node: Any, where: str) -> None:
    if node.style is not None:  # quoted: text, whatever it looks like
        return
    number = node.tag in (_TAG + "int", _TAG + "float")
    if number and _LEADING_ZERO.fullmatch(node.value):
        raise ConfigError(
            where,
            expected="a number without leading zeros (YAML 1.1 reads them as octal, YAML 1.2 does not)",
            got=node.value,
            fix="Leave the zeros out, or quote it if it is text",
        )
    if node.tag == _TAG + "str" and node.value == "None":
        raise ConfigError(
            where, expected="null", got="None, which is text in YAML", fix="Write null, or quote it"
        )
