"""The subject model: loaded, read at hooks, run with activations replaced, made to generate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.common.lazy import lazy_getattr

if TYPE_CHECKING:
    from winnow.subject.load import Subject as Subject

__all__ = ["Subject"]  # pyright: ignore[reportUnsupportedDunderAll]

# Lazy, since importing the package alone must not load torch, which takes seconds.
__getattr__ = lazy_getattr(__name__, {"Subject": "winnow.subject.load"})


def __dir__() -> list[str]:
    return __all__
