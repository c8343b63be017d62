"""Attribution graphs that the site shows: in a set's folder or named, and checked before they are used."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from winnow.schemas.base import MAX_JSON_BYTES, sha256_hex
from winnow.schemas.errors import ConfigError, IntegrityError, StoreError, WinnowError
from winnow.schemas.graph import GraphFile
from winnow.store.objects import ObjectStore

log = logging.getLogger("winnow.explorer")

GRAPHS = "graphs"
"""Folder below a set's with its graphs."""
# A page of more links takes seconds to draw anew; the contract's own limit is for programs.
MAX_LINKS = 400_000
"""Links of a graph that the page shows."""
# All of a folder's graphs are parsed for the list of them, which must not take minutes.
MAX_GRAPHS = 100
"""Graphs of a folder that are listed."""
_PARSED = 4
"""Graphs kept in memory; one of 50,000 links takes about 60 MB as Python objects."""


@dataclass
class Source:
    """Where one graph is read from.

    Attributes:
        name: What the page calls it; no request's text is ever joined to a path.
        size: Its length in bytes.
        read: Reads its bytes.
    """

    name: str
    size: int
    read: Callable[[], bytes]


@dataclass
class Shelf:
    """The graphs of a server: those in a set's folder, which may become more, and files named at its start.

    Attributes:
        store: Folder with graphs (`*.json`); None if there is no set.
        files: Graph files named at the start.
    """

    store: ObjectStore | None = None
    files: list[Path] = field(default_factory=list)
    _parsed: OrderedDict[str, GraphFile] = field(default_factory=OrderedDict, repr=False)
    _lines: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __bool__(self) -> bool:
        """Whether graphs can be on it."""
        return self.store is not None or bool(self.files)

    def sources(self) -> dict[str, Source]:
        """The graphs there are now, by name."""
        found: dict[str, Source] = {}
        for path in self.files:
            _add(found, path.stem, path.stat().st_size if path.is_file() else 0, path.read_bytes)
        if self.store is not None:
            store = self.store
            keys = [(key, size) for key, size in store.list() if key.endswith(".json") and "/" not in key]
            for key, size in keys[:MAX_GRAPHS]:
                _add(found, key.removesuffix(".json"), size, lambda key=key: store.get(key, MAX_JSON_BYTES))
        return found

    def list(self) -> list[dict[str, Any]]:
        """One line per graph; of one that cannot be read, `problem` says why."""
        return [
            {"name": each.name, "bytes": each.size} | self._line(each) for each in self.sources().values()
        ]

    def _line(self, source: Source) -> dict[str, Any]:
        try:
            digest, data = _read(source)
            if digest not in self._lines:
                graph = self._parse(source.name, digest, data)
                self._lines[digest] = {
                    "prompt": graph.metadata.prompt,
                    "nodes": len(graph.nodes),
                    "links": len(graph.links),
                }
        except StoreError as error:
            # The text of a storage's error may contain its address, which is for the log only.
            log.error("%s", error)
            return {"problem": "The storage failed; the server's log says more"}
        except WinnowError as error:
            return {"problem": str(error)}
        return self._lines[digest]

    def graph(self, name: str) -> GraphFile:
        """The graph of this name.

        Raises:
            ConfigError: There is none, or it is larger than the page can show.
            IntegrityError: It is no graph.
        """
        digest, data = _read(self._source(name))
        return self._parse(name, digest, data)

    def raw(self, name: str) -> bytes:
        """The bytes of a graph's file, checked; errors as of `graph`."""
        digest, data = _read(self._source(name))
        self._parse(name, digest, data)
        return data

    def _source(self, name: str) -> Source:
        found = self.sources()
        if name not in found:
            raise ConfigError("graph", expected=f"one of {', '.join(found) or 'none'}", got=name)
        return found[name]

    def _parse(self, name: str, digest: str, data: bytes) -> GraphFile:
        # One at a time: two first requests at once would parse the file twice, at 60 MB each.
        with self._lock:
            if digest not in self._parsed:
                graph = GraphFile.from_json(data, origin=name)
                if len(graph.links) > MAX_LINKS:
                    raise _too_large(name, f"{MAX_LINKS:,} links", f"{len(graph.links):,}")
                self._parsed[digest] = graph
                while len(self._parsed) > _PARSED:
                    self._parsed.popitem(last=False)
            self._parsed.move_to_end(digest)
            return self._parsed[digest]


def _read(source: Source) -> tuple[str, bytes]:
    """(digest, bytes) of a graph's file."""
    # Parsed graphs are kept by digest: reading 5 MB takes milliseconds where parsing takes a second, and a
    # file that is written anew while the server runs is noticed on any storage.
    if source.size > MAX_JSON_BYTES:
        raise _too_large(source.name, f"{MAX_JSON_BYTES:,} bytes", f"{source.size:,}")
    try:
        data = source.read()
    except WinnowError:
        raise
    except OSError as error:
        raise IntegrityError(f"the graph {source.name} cannot be read", got=error.strerror) from error
    return sha256_hex(data), data


def _add(found: dict[str, Source], stem: str, size: int, read: Callable[[], bytes]) -> None:
    name, number = stem, 2
    while name in found:
        name, number = f"{stem} ({number})", number + 1
    found[name] = Source(name, size, read)


def _too_large(name: str, most: str, got: str) -> ConfigError:
    return ConfigError(f"the graph {name}", expected=f"at most {most}", got=got, fix="Prune it further")
