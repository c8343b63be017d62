"""The base of every contract: frozen pydantic models with canonical JSON, digests and versions."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Self, TypeVar, cast, get_args

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from winnow.schemas.errors import ConfigError, IntegrityError, UnsupportedVersion

MAX_JSON_BYTES = 64 * 1024 * 1024
"""Largest JSON artefact that is parsed, in bytes; anything longer is refused unread."""

# Lower case only: digests are compared, and used in keys, as text.
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""A SHA-256 digest in lower-case hexadecimal."""

# Keys from stored manifests are joined to a local root or a bucket's prefix as they are, so the alphabet
# itself must rule out `..`, a leading slash, a drive letter and a scheme.
RelativeKey = Annotated[
    str,
    StringConstraints(
        pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*$", max_length=512
    ),
]
"""Key of an object below a root. No part of it begins with a dot, so no key leaves the root."""

HookName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]+([.][A-Za-z0-9_]+)*$", max_length=200)]
"""Where activations are read: `resid_pre`, `attn_out`, `resid_mid`, `mlp_in`, `mlp_out` or `resid_post` with
a layer's number (`resid_post.9`), or the dotted path of a module of the subject."""

RootName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
"""Name of one of several datasets that are read together. It is a part of figures' ids."""

ReadHook = Annotated[
    str,
    StringConstraints(pattern=r"^([a-z][a-z0-9_]{0,39}/)?[A-Za-z0-9_]+([.][A-Za-z0-9_]+)*$", max_length=241),
]
"""A hook as a run reads it: `HookName`, or with several datasets `NAME/HOOK` (`base/resid_post.9`)."""


def sha256_hex(data: bytes | bytearray | memoryview) -> str:
    """Return the SHA-256 of `data` in lower-case hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> bytes:
    """Encode as JSON with sorted keys, no spaces, no NaN, UTF-8: equal values give equal bytes."""
    # Fingerprints of existing datasets are digests of these bytes: no option here may change.
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False
    ).encode()


class Contract(BaseModel):
    """A frozen model that refuses unknown fields, and NaN and infinity in every float."""

    # Unknown fields are refused because a misspelt one would silently leave its default in force; NaN and
    # infinity because canonical JSON cannot hold them.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    def canonical(self) -> bytes:
        """Return this model as canonical JSON."""
        return canonical_json(self.model_dump(mode="json"))

    def digest(self) -> str:
        """Return the SHA-256 of the canonical JSON."""
        return sha256_hex(self.canonical())


class Artefact(Contract):
    """A contract that is stored: it names its kind and version, and is parsed as hostile input.

    Each subclass has a field `kind`, a literal that says what the object is.
    """

    MAJOR: ClassVar[int] = 1

    version: str = "1.0"
    """Version of the format, `major.minor`; another major version is refused."""

    def to_json(self) -> bytes:
        """Return indented JSON for people and diffs, with a newline at the end; `from_json` parses it."""
        text = json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=False)
        return text.encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes, *, origin: str) -> Self:
        """Parse stored bytes as hostile input.

        Args:
            data: The object's bytes.
            origin: Their address, for messages.

        Raises:
            IntegrityError: Not JSON, too large, or fields that do not fit.
            UnsupportedVersion: Another kind of object or another major version.
        """
        kind = cls.model_fields["kind"].default
        # Before parsing: Python's objects take many times the bytes of their JSON.
        if len(data) > MAX_JSON_BYTES:
            raise IntegrityError(
                f"{origin} is too large to be a {kind}",
                expected=f"at most {MAX_JSON_BYTES} bytes",
                got=f"{len(data)} bytes",
            )
        try:
            raw: Any = json.loads(data)
        except (ValueError, RecursionError) as error:  # RecursionError: brackets nested thousands deep
            raise IntegrityError(
                f"{origin} is not readable JSON", expected=kind, got=str(error)[:200]
            ) from error
        # A list, number or text has no kind: its type is named in the place of one.
        fields = cast("dict[str, Any]", raw) if isinstance(raw, dict) else {"kind": type(raw).__name__}
        # Kind and version before the fields: of another version, validation would only list unknown fields.
        if fields.get("kind") != kind:
            got = fields.get("kind")
            raise UnsupportedVersion(f"{origin} is another kind of object", expected=kind, got=got)
        major = str(fields.get("version", "")).split(".")[0]
        if major != str(cls.MAJOR):
            raise UnsupportedVersion(
                f"{origin} has a version this Winnow cannot read",
                expected=f"{cls.MAJOR}.x",
                got=fields.get("version"),
                fix="Read it with the Winnow release that wrote it, or upgrade this one",
            )
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise IntegrityError(f"{origin} does not fit {kind} {cls.MAJOR}.x", got=explain(error)) from error


Places = Mapping[tuple[str | int, ...], int]
"""Line (from 1) of a text at which the value under these keys and list indices begins."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Return `; did you mean latents` for the names that are most like a misspelt one; empty if none is."""
    found = get_close_matches(name, list(names), n=3, cutoff=0.7)
    return f"; did you mean {' or '.join(found)}" if found else ""


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field's annotation holds, directly, in a union or in a collection."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _near(model: type[BaseModel], place: tuple[str | int, ...]) -> str:
    """`nearest` for the unknown field at `place` of a model; at the top also of its name in a section."""
    *parents, name = map(str, place)
    models: list[type[BaseModel]] = [model]
    for part in parents:
        fields = [each.model_fields[part] for each in models if part in each.model_fields]
        # An index of a list, or a key of a mapping, is no field: the models inside are already found.
        models = [inner for field in fields for inner in _models_in(field.annotation)] if fields else models
    own = nearest(name, [field for each in models for field in each.model_fields])
    if own or parents:
        return own
    sections = {
        f"{section}.{field}": field
        for section, info in model.model_fields.items()
        for inner in _models_in(info.annotation)
        for field in inner.model_fields
    }
    same = [dotted for dotted, field in sections.items() if field == name]
    return f"; did you mean {' or '.join(same)}" if same else ""


def explain(
    error: ValidationError, places: Places | None = None, model: type[BaseModel] | None = None
) -> str:
    """Render a pydantic error as one line: each field's path, line if known, complaint and input.

    Args:
        error: The error.
        places: Lines of the text that was parsed.
        model: What was validated; with it, names like a misspelt one are suggested.
    """
    lines: list[str] = []
    found = error.errors(include_url=False)
    # Entries that are wrong are not counted by pydantic, which then calls a list of them too short as well.
    wrong = {item["loc"][:depth] for item in found for depth in range(len(item["loc"]))}
    found = [item for item in found if item["type"] != "too_short" or item["loc"] not in wrong]
    # Eight at most: a long list of wrong entries fails once for each, and the first few show the mistake.
    for item in found[:8]:
        path = ".".join(str(part) for part in item["loc"]) or "(top)"
        # An absent field has no line of its own: the line of what should contain it is named.
        place = item["loc"][:-1] if item["type"] == "missing" else item["loc"]
        if places and place in places:
            path += f" (line {places[place]})"
        # A complaint about a whole section names its fields itself; printing the section would bury it.
        entered: object = item["input"]
        plain = item["type"] != "missing" and not isinstance(entered, dict)
        given = f" (got {entered!r:.80})" if plain else ""
        said = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            said, given = "no such field" + (_near(model, item["loc"]) if model else ""), ""
        if item["type"] == "literal_error":
            # pydantic's own words: "Input should be 'a', 'b' or 'c'"
            given += nearest(f"{entered}", re.findall(r"'([^']+)'", said))
        lines.append(f"{path}: {said}{given}")
    return "; ".join(lines)


M = TypeVar("M", bound=BaseModel)


def validate(model: type[M], raw: Any, *, origin: str, lines: Places | None = None) -> M:
    """Validate `raw` as `model`.

    Raises:
        ConfigError: Fields that are wrong, each named with its line; `true` or `false` where a number is due.
    """
    try:
        taken = model.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(
            f"{origin} is not valid: {explain(error, lines, model)}", fix="Correct the named fields"
        ) from error
    for place, flag in _flags_as_numbers(raw, taken, ()):
        name = ".".join(map(str, place)) + (f" (line {lines[place]})" if lines and place in lines else "")
        raise ConfigError(f"{origin}: {name}", expected="a number", got=str(flag).lower(), fix="Correct it")
    return taken


def _flags_as_numbers(given: Any, taken: Any, place: tuple[str | int, ...]) -> Iterator[tuple[Any, bool]]:
    """Yield (place, flag) of each `true` or `false` of `given` that became the number 1 or 0 in `taken`."""
    # pydantic converts a bool to int and float: `epochs: true` would train one epoch.
    if isinstance(given, bool) and type(taken) in (int, float):
        yield place, given
    elif isinstance(given, dict):
        for key, value in cast("dict[str, Any]", given).items():
            inner: Any = taken.get(key) if isinstance(taken, dict) else getattr(taken, key, None)  # pyright: ignore
            yield from _flags_as_numbers(value, inner, (*place, key))
    elif isinstance(given, list) and isinstance(taken, tuple):
        pairs = zip(cast("list[Any]", given), cast("tuple[Any, ...]", taken), strict=False)
        for index, (value, inner) in enumerate(pairs):
            yield from _flags_as_numbers(value, inner, (*place, index))
