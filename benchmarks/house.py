"""A map of the code: files, lines and comments per room, floors, import circles, the longest functions.

    python -m benchmarks.house [--json OUT]

A `# comment` counts unless it only speaks to a tool (`noqa`, `pyright:`, `type:`, `fmt:`) or draws a line.
"""

from __future__ import annotations

import argparse
import ast
import json
import tokenize
import tomllib
from pathlib import Path
from typing import NamedTuple

import grimp

ROOT = Path(__file__).parents[1]
LONG_FUNCTION = 60
"""Lines from which a function is too long to be read at one glance."""
_TO_TOOLS = ("noqa", "pyright:", "type:", "fmt:", "----")


class Room(NamedTuple):
    """What one room holds."""

    name: str
    files: int
    lines: int
    comments: int


class Function(NamedTuple):
    """A function of more than `LONG_FUNCTION` lines."""

    lines: int
    file: str
    name: str


def survey(folder: Path) -> tuple[Room, list[Function]]:
    """The Python files below `folder`, counted, and their long functions."""
    files, lines, comments, found = 0, 0, 0, list[Function]()
    for path in sorted(folder.rglob("*.py")):
        files += 1
        with path.open("rb") as file:
            tokens = list(tokenize.tokenize(file.readline))
        comments += sum(
            token.type == tokenize.COMMENT and not any(word in token.string for word in _TO_TOOLS)
            for token in tokens
        )
        text = path.read_text(encoding="utf-8")
        lines += text.count("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                if length > LONG_FUNCTION:
                    found.append(Function(length, str(path.relative_to(ROOT)), node.name))
    return Room(folder.name, files, lines, comments), found


def floors() -> dict[str, int]:
    """The number of floors that import-linter holds, per package."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    layered = [contract for contract in contracts if contract["type"] == "layers"]
    return {contract["containers"][0]: len(contract["layers"]) for contract in layered}


def circles() -> list[list[str]]:
    """Groups of modules that import each other, directly or round about (Tarjan's components)."""
    graph = grimp.build_graph("winnow")
    order, low, stack, found = dict[str, int](), dict[str, int](), list[str](), list[list[str]]()

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for other in graph.find_modules_directly_imported_by(module):
            if other not in order:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], order[other])
        if low[module] == order[module]:
            at = stack.index(module)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for module in sorted(graph.modules):
        if module not in order:
            visit(module)
    return found


def main() -> None:
    """Print the map."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the map to this file")
    options = parser.parse_args()
    surveys = [survey(path.resolve()) for path in sorted((ROOT / "winnow").iterdir()) if path.is_symlink()]
    rooms = [room for room, _ in surveys]
    long = sorted((one for _, found in surveys for one in found), reverse=True)
    lines, comments = sum(room.lines for room in rooms), sum(room.comments for room in rooms)
    for room in rooms:
        share = (
            f"{room.lines / lines:4.0%} of the lines, {100 * room.comments / room.lines:.1f} comments per 100"
        )
        print(f"{room.name:10} {room.files:4} files {room.lines:6} lines, {share}")
    files, per_100 = sum(room.files for room in rooms), 100 * comments / lines
    print(f"{'all':10} {files:4} files {lines:6} lines, {per_100:.1f} comments per 100")
    held, found = floors(), circles()
    print("floors:", ", ".join(f"{name} {count}" for name, count in held.items()))
    print("circles:", found or "none")
    print(f"functions over {LONG_FUNCTION} lines: {len(long)}")
    for one in long:
        print(f"  {one.lines:4} {one.file} {one.name}")
    if options.json:
        report = {
            "rooms": [room._asdict() for room in rooms],
            "floors": held,
            "circles": found,
            "long_functions": [one._asdict() for one in long],
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
