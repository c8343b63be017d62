"""Pages of the contracts: every field of the config, and every document that is stored."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator

import winnow.schemas
from docs.generate.schema import Schema, entries, facts, kind, prose, schema_of, target
from winnow.schemas.base import Artefact
from winnow.schemas.config import Config

INTRODUCTION = """# Every field of a config

One YAML file configures every stage; each stage reads its own sections only. Fields that are left out have
the defaults below. An unknown field is an error, so a misspelt one cannot leave a default in force
unnoticed.

Any field can be overridden on the command line, by its path on this page:

```sh
winnow train configs/quickstart.yaml --set train.latents=16384 --set train.out=runs/wide
```

`configs/quickstart.yaml` is the example to copy. This page is generated from the program.
"""
FILES = """# Stored documents

What Winnow stores beside arrays and weights are JSON documents, and these are all kinds of them. Each names
its `kind` and its `version`. Another major version is refused; so is a field that is not in this list, or a
value of another type. [The dataset on disk](../data.md) says which key each has. This page is generated
from the program.
"""


def config_page() -> str:
    """Write the page of all fields of a config."""
    whole = schema_of(Config)
    parts = [INTRODUCTION, "## The file { #file }\n", prose(whole)]
    sections = [(name, target(field, whole)) for name, field, _ in entries(whole)]
    parts += [
        _field(name, name, field, required, whole)
        for (name, field, required), (_, held) in zip(entries(whole), sections, strict=True)
        if held is None
    ]
    for name, field, required in entries(whole):
        held = target(field, whole)
        if held is not None:
            parts += [f"## {name} {{ #{name} }}\n", prose(field), facts(name, field, required, whole)]
            parts += _section(name, held, whole, 3)
    return "\n\n".join(parts) + "\n"


def _section(path: str, section: Schema, whole: Schema, level: int) -> Iterator[str]:
    """The fields of a section; sections inside it follow, each under a heading of its own."""
    yield prose(section)
    inside: list[tuple[str, Schema]] = []
    for name, field, required in entries(section):
        yield _field(f"{path}.{name}", name, field, required, whole)
        held = target(field, whole)
        if held is not None and "properties" in held:
            inside.append((f"{path}.{name}", held))
    for below, held in inside:
        yield f"{'#' * level} In {below} {{ #in-{below} }}"
        yield from _section(below, held, whole, level)


def _field(path: str, name: str, field: Schema, required: bool, whole: Schema) -> str:
    said, held = facts(name, field, required, whole), target(field, whole)
    if held is not None and "properties" in held:
        said = re.sub(r"sections?", rf"[\g<0>](#in-{path})", said, count=1)
    return f"#### {path} {{ #{path} }}\n\n{said}\n\n{prose(field)}"


def artefacts() -> list[type[Artefact]]:
    """Import every schema and return the documents that are stored, sorted by their kinds."""
    for module in pkgutil.iter_modules(winnow.schemas.__path__):
        importlib.import_module(f"winnow.schemas.{module.name}")
    return sorted(Artefact.__subclasses__(), key=lambda found: str(found.model_fields["kind"].default))


def files_page() -> str:
    """Write the page of all stored documents."""
    parts = [FILES]
    for artefact in artefacts():
        whole = schema_of(artefact)
        parts += [f"## {artefact.model_fields['kind'].default}", prose(whole), _list(whole, whole)]
        for name, held in whole.get("$defs", {}).items():
            if "properties" in held:
                parts += [f"**{name}**: {prose(held)}", _list(held, whole)]
    return "\n\n".join(parts) + "\n"


def _list(section: Schema, whole: Schema) -> str:
    """The fields of a document as a definition list: a table of three columns does not fit a telephone."""
    parts: list[str] = []
    for name, field, _ in entries(section):
        if name == "kind":  # the heading says it
            continue
        held = target(field, whole)
        values = kind(field, whole)
        if held is not None and "properties" in held:
            values = values.replace("section", held["title"])
        said = " ".join(prose(field).split())
        parts.append(f"`{name}` <small>{values}</small>\n:   {said}")
    return "\n\n".join(parts)
