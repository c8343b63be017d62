"""Attribution graphs for the pages of circuit-tracer and Neuronpedia, and theirs for Winnow.

The JSON is one layout, `winnow.schemas.graph`. circuit-tracer's page serves a folder of such files, which it
lists in `graph-metadata.json`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from winnow.schemas.errors import ConfigError
from winnow.schemas.graph import GraphFile
from winnow.store.objects import open_store

NAME = "neuronpedia-graph"
LIST = "graph-metadata.json"
_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def read_graph(path: Path) -> GraphFile:
    """Read a graph's file.

    Raises:
        ConfigError: There is no such file.
        IntegrityError: It is no graph.
        UnsupportedVersion: Written by a Winnow of another major version.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is not there", expected="a graph's JSON file")
    return GraphFile.from_json(path.read_bytes(), origin=str(path))


def import_graph(source: Path, out: str) -> GraphFile:
    """Check a graph of another program's and write it to the folder or URI `out` as `graph.json`.

    Raises:
        ConfigError: There is no such file, or `out` holds a graph already.
        IntegrityError: It is no graph; of two nodes of one id, it says so.
    """
    graph, store = read_graph(source), open_store(out)
    if store.size("graph.json") is not None:
        raise ConfigError(f"{out} holds a graph already", fix="Import into another folder")
    store.put("graph.json", graph.to_json())
    return graph


def export_graph(source: Path, out: Path) -> list[Path]:
    """Write a graph to the folder `out` as circuit-tracer's page serves it: `SLUG.json` and the list.

    Raises:
        ConfigError: There is no such file, or its slug is no name for a file.
        IntegrityError: It is no graph.
    """
    graph = read_graph(source)
    # The slug comes from a file that may be anybody's, and must not lead out of the folder.
    if not _SLUG.fullmatch(graph.metadata.slug):
        raise ConfigError(
            f"{source}: metadata.slug", expected="letters, digits, `_`, `.` and `-`", got=graph.metadata.slug
        )
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{graph.metadata.slug}.json", out / LIST]
    files[0].write_bytes(graph.to_json())
    metadata = json.loads(graph.to_json())["metadata"]
    metadata.pop("winnow", None)
    files[1].write_text(json.dumps({"graphs": [metadata]}, indent=2), encoding="utf-8")
    return files
