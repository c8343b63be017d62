"""JSON schemas of contracts, in words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from winnow.schemas.base import Contract

Schema = dict[str, Any]
NAMES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false"}
UNITS = (
    "bytes", "seconds", "hours", "tokens", "rows", "windows", "units", "steps", "latents", "epochs", "actors",
    "documents", "chars",
)  # fmt: skip
"""Words of a field's name that are its unit; in other fields the sentence says it."""
BOUNDS = (
    ("exclusiveMinimum", "above {}"),
    ("minimum", "at least {}"),
    ("exclusiveMaximum", "below {}"),
    ("maximum", "at most {}"),
    ("multipleOf", "a multiple of {}"),
)


def schema_of(contract: type[Contract]) -> Schema:
    """Return the JSON schema of a contract, as it is written in a file."""
    return contract.model_json_schema()


def target(schema: Schema, whole: Schema) -> Schema | None:
    """Return the contract that a field holds, directly, in a list or as one of several values; or None.

    Args:
        schema: The field's schema.
        whole: The schema that holds the definitions.
    """
    if "$ref" in schema:
        return whole["$defs"][schema["$ref"].rpartition("/")[2]]
    inner = [*schema.get("anyOf", []), schema.get("items") or {}, schema.get("additionalProperties") or {}]
    found = [target(part, whole) for part in inner if isinstance(part, dict) and part]
    return next((one for one in found if one is not None), None)


def kind(schema: Schema, whole: Schema) -> str:
    """Say the values of a field: `integer above 0, or null`."""
    if "$ref" in schema:
        held = target(schema, whole) or {}
        return kind(held, whole) if "enum" in held else "section"
    if "anyOf" in schema:
        said = [kind(part, whole) for part in schema["anyOf"]]
        return ", or ".join(dict.fromkeys(said))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return _either([f"`{value}`" for value in schema["enum"]])
    return _bounded(_of_type(schema, whole), schema)


def _of_type(schema: Schema, whole: Schema) -> str:
    named = schema.get("type")
    if named == "null":
        return "null"
    if named == "array":
        if "prefixItems" in schema:
            return f"{len(schema['prefixItems'])} of: {kind(schema['prefixItems'][0], whole)}"
        inside = kind(schema["items"], whole) if schema.get("items") else "values"
        return "list of sections" if inside == "section" else f"list of: {inside}"
    if named == "object":
        of = schema.get("additionalProperties") or next(iter(schema.get("patternProperties", {}).values()), 0)
        return f"mapping of names to: {kind(of, whole)}" if isinstance(of, dict) else "mapping"
    return NAMES.get(str(named), "any value")


def _bounded(said: str, schema: Schema) -> str:
    bounds = [words.format(f"{schema[name]:,}") for name, words in BOUNDS if name in schema]
    return f"{said} {', '.join(bounds)}" if bounds else said


def _either(values: list[str]) -> str:
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} or {values[-1]}"


def unit_of(name: str) -> str | None:
    """Return the unit that a field's name ends or begins with; None if it does not, or is that word alone."""
    words = name.split("_per_")[0].split("_")
    return next((unit for unit in UNITS if unit in (words[-1], words[0]) and unit != name), None)


def default_of(schema: Schema, required: bool) -> str:
    """Say a field's default, as YAML would write it."""
    if required:
        return "**required**"
    value = schema.get("default")
    if isinstance(value, dict) and value:
        return "default: that of each field below"
    return f"default `{value if isinstance(value, str) and value.strip() else json.dumps(value)}`"


def entries(schema: Schema) -> Iterator[tuple[str, Schema, bool]]:
    """Iterate over the fields of an object: name, schema, whether it is required."""
    required = schema.get("required", [])
    for name, field in schema.get("properties", {}).items():
        yield name, field, name in required


def facts(name: str, field: Schema, required: bool, whole: Schema) -> str:
    """Say type, unit and default of a field on one line."""
    unit = unit_of(name)
    said = [kind(field, whole)]
    if unit and said[0].startswith(("integer", "number")):
        said.append(f"in {'characters' if unit == 'chars' else unit}")
    return " · ".join([*said, default_of(field, required)])


def prose(schema: Schema) -> str:
    """Return a schema's docstring as Markdown."""
    return str(schema.get("description", "")).strip()
