"""The repository's pages as the site takes them.

Pages of `docs/` keep their places. What they link to elsewhere in the repository gets a page too, at
`repository/<path>`: the site then needs no host, and a page can be read on the code host as it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

ALSO = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docker/README.md", "explorer/static/icon.svg")
HEADS = {"docs/index.md": "---\nhide: [toc]\n---\n\n"}
"""What precedes a page's text in the site only: a code host would show it."""
LANGUAGES = {".py": "python", ".sh": "sh", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".txt": "text"}
"""Suffixes of source files, which are shown on a page; files with others are copied."""
_FENCE = re.compile(r"(^```.*?^```[ ]*$)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_ITEM = re.compile(r"(?:[-*]|\d+\.) ")


class Pages:
    """Files of the site, by their paths in the repository.

    Args:
        root: The repository.
        also: Files outside `docs/` that the site has whether or not a page links to them.
    """

    def __init__(self, root: Path, also: Sequence[str] = ALSO) -> None:
        self.root, self.also = root, also
        self.files: dict[str, bytes] = {}
        """Path in the site -> content, after `collect`."""
        self._written: dict[str, str] = {}
        self._linked: dict[str, str] = {}

    def add(self, path: str, text: str) -> None:
        """Add a page that is not in the repository.

        Args:
            path: Where it would be in the repository, such as `docs/reference/config.md`.
            text: Its Markdown.
        """
        self._written[path] = text

    def collect(self) -> None:
        """Fill `files` with the pages and everything in the repository that they link to.

        Raises:
            FileNotFoundError: A page links to a file that is not there.
        """
        found = (path for path in (self.root / "docs").rglob("*") if path.suffix in (".md", ".css"))
        # Remarks are a part of the page beside them.
        docs = [path for path in found if not path.name.endswith(".remarks.md")]
        waiting = [*self._written, *(path.relative_to(self.root).as_posix() for path in docs), *self.also]
        done: set[str] = set()
        while waiting:
            path = waiting.pop()
            if path in done:
                continue
            if path not in self._written and not (self.root / path).is_file():
                raise FileNotFoundError(f"{self._linked[path]} links to {path}, which does not exist")
            done.add(path)
            for there in self._take(path):
                self._linked.setdefault(there, path)
                waiting.append(there)

    def _take(self, path: str) -> set[str]:
        """Add one file; returns the files that it links to."""
        linked: set[str] = set()
        language = LANGUAGES.get(PurePosixPath(path).suffix)
        if path.endswith(".md"):
            text = self._written.get(path) or (self.root / path).read_text(encoding="utf-8")
            self.files[place(path)] = (HEADS.get(path, "") + self._page(text, path, linked)).encode()
        elif language:
            # Four backticks: a docstring may hold a block of three.
            text = (self.root / path).read_text(encoding="utf-8")
            self.files[place(path)] = f"# `{path}`\n\n````{language}\n{text}````\n".encode()
        else:
            self.files[place(path)] = (self.root / path).read_bytes()
        return linked

    def _page(self, text: str, path: str, linked: set[str]) -> str:
        """The Markdown of a page for the site; files that it links to are added to `linked`."""
        parts = _FENCE.split(text)
        # Of the split by one group, the fences are the odd parts.
        for number in range(0, len(parts), 2):
            prose = separate_lists(parts[number])
            parts[number] = _LINK.sub(lambda found: self._link(found[1], found[2], path, linked), prose)
        return "".join(parts)

    def _link(self, label: str, target: str, path: str, linked: set[str]) -> str:
        # A picture may be the label of a link.
        label = _LINK.sub(lambda found: self._link(found[1], found[2], path, linked), label)
        name, hash_, anchor = target.partition("#")
        if not name or re.match(r"[a-z]+:", name):
            return f"[{label}]({target})"
        there = os.path.normpath(PurePosixPath(path).parent / name)
        if (self.root / there).is_dir():
            # A folder has no page: its name stays, as text.
            return label
        linked.add(there)
        way = os.path.relpath(place(there), PurePosixPath(place(path)).parent)
        return f"[{label}]({PurePosixPath(way)}{hash_}{anchor})"

    def write(self, out: Path) -> None:
        """Write the files to the folder `out`, and remove what else is in it.

        A file whose content is the same is left alone, so that a server that watches the folder builds only
        what has changed.
        """
        for path, content in self.files.items():
            file = out / path
            if not file.is_file() or file.read_bytes() != content:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
        for file in out.rglob("*"):
            if file.is_file() and file.relative_to(out).as_posix() not in self.files:
                file.unlink()


def place(path: str) -> str:
    """Where a file of the repository is in the site."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    shown = PurePosixPath(path).suffix in LANGUAGES
    return f"repository/{path}" + (".md" if shown else "")


def separate_lists(prose: str) -> str:
    """Put a blank line before a list that follows a paragraph's line.

    CommonMark, by which code hosts read a page, begins a list there; Python-Markdown does not.
    """
    lines: list[str] = []
    inside = False
    for line in prose.split("\n"):
        item = bool(_ITEM.match(line))
        if item and not inside and lines and lines[-1].strip():
            lines.append("")
        inside = bool(line.strip()) and (inside or item)
        lines.append(line)
    return "\n".join(lines)
