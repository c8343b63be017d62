"""The fields and tensors of other libraries' files: none is dropped silently.

Every format lists the fields that its library has ever written: those the reader uses, and those that
describe the training and not what the SAE computes. Any other field is named in a note, any other tensor is
an error.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from winnow.schemas.errors import ConfigError, IntegrityError

# Values of an option that is off. A field unknown to us that is off changes nothing, and notes on such fields
# would hide the one that matters. 0 equals False here, and is off too.
_SAYS_NOTHING: tuple[object, ...] = (None, False, "", "none", [], {})
_SHOWN_LENGTH = 60
"""Characters of a value in a note."""
_KINDS = {bool: "true or false", str: "a text", dict: "an object", list: "a list"}


def words(text: str) -> frozenset[str]:
    """The names in a text, separated by any white space."""
    return frozenset(text.split())


def unknown_fields(fields: Mapping[str, Any], known: Collection[str], origin: Path) -> tuple[str, ...]:
    """A note that names every field of `fields` that is not in `known`; no note if there is none."""
    odd = [
        f"{name}: {_short(value)}"
        for name, value in fields.items()
        if name not in known and value not in _SAYS_NOTHING
    ]
    return (f"{origin}: ignored, since Winnow does not know them: {', '.join(odd)}",) if odd else ()


def refuse_tensors(found: Collection[str], known: Collection[str], origin: Path) -> None:
    """Check that there are no tensors beyond `known`.

    Raises:
        ConfigError: There are; it names them.
    """
    # An error and not a note: unlike a field, a weight that is not used always gives other numbers.
    odd = sorted(set(found) - set(known))
    if odd:
        raise ConfigError(
            f"{origin} holds {', '.join(odd)}",
            expected=f"none but {', '.join(sorted(known))}",
            fix="Without them it would give other numbers: Winnow has no SAE of this kind",
        )


def require_size(origin: Path, name: str, said: object, found: int) -> None:
    """Check a size that a config gives, if it gives one, against the tensors.

    Raises:
        ConfigError: They differ.
    """
    # The tensors are right by themselves; a config that disagrees belongs to other weights.
    if said is not None and said != found:
        raise ConfigError(f"{origin}: {name}", expected=f"{found}, the tensors' size", got=said)


def require_types(fields: Mapping[str, Any], kinds: Mapping[type, Collection[str]], origin: Path) -> None:
    """Check the types of fields; one that is absent or null passes.

    Args:
        fields: The config.
        kinds: Type -> the fields that must be of it.
        origin: The config's file, for the message.

    Raises:
        IntegrityError: A field is of another type.
    """
    for kind, names in kinds.items():
        for name in names:
            if not isinstance(value := fields.get(name), kind | None):
                raise IntegrityError(f"{origin}: {name}", expected=_KINDS[kind], got=_short(value))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_LENGTH else text[: _SHOWN_LENGTH - 1] + "…"
