"""The data plane: manifests, zarr and object storage. Start with `ActivationStore`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from winnow.store.read.reader import ActivationStore as ActivationStore

_PLACES = {"ActivationStore": "winnow.store.read.reader"}
__all__ = ["ActivationStore"]  # pyright: ignore[reportUnsupportedDunderAll]


# Lazy, since `import winnow.store` alone must not load torch, which takes seconds.
def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return __all__
