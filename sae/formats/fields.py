"""The fields and tensors of other libraries' files: each is known, or it is named; none is dropped.

Every format lists the fields that its library has ever written: those the reader uses, and those that say how
the SAE was trained and nothing of what it computes. A field beyond both is named in a note, unless its value
says nothing. A tensor beyond a format's is an error: a weight that is not used gives other numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from winnow.schemas.errors import ConfigError

SAYS_NOTHING: tuple[object, ...] = (None, False, "", "none", [], {})
SHOWN_LENGTH = 60
"""Characters of a value in a note."""


def words(text: str) -> frozenset[str]:
    """The names in a text, however it is laid out."""
    return frozenset(text.split())


def unknown_fields(fields: Mapping[str, Any], known: Collection[str], origin: Path) -> tuple[str, ...]:
    """One note that names every field of `fields` beyond `known`, or none."""
    odd = [
        f"{name}: {_short(value)}"
        for name, value in fields.items()
        if name not in known and value not in SAYS_NOTHING
    ]
    return (f"{origin}: left out, since Winnow does not know them: {', '.join(odd)}",) if odd else ()


def refuse_tensors(found: Collection[str], known: Collection[str], origin: Path) -> None:
    """ConfigError that names every tensor beyond `known`."""
    odd = sorted(set(found) - set(known))
    if odd:
        raise ConfigError(
            f"{origin} holds {', '.join(odd)}",
            expected=f"none but {', '.join(sorted(known))}",
            fix="Without them it would give other numbers: it is of a kind that Winnow does not have",
        )


def require_size(origin: Path, name: str, said: object, found: int) -> None:
    """ConfigError where a config's size is not that of the tensors; a size that is not said is right."""
    if said is not None and said != found:
        raise ConfigError(f"{origin}: {name}", expected=f"{found}, the tensors' size", got=said)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_LENGTH else text[: SHOWN_LENGTH - 1] + "…"
