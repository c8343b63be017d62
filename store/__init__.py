"""The data plane: manifests, zarr and object storage. Start with `ActivationStore`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.common.lazy import lazy_getattr

if TYPE_CHECKING:
    from winnow.store.read.reader import ActivationStore as ActivationStore

__all__ = ["ActivationStore"]  # pyright: ignore[reportUnsupportedDunderAll]

# Lazy, since importing the package alone must not load torch, which takes seconds.
__getattr__ = lazy_getattr(__name__, {"ActivationStore": "winnow.store.read.reader"})


def __dir__() -> list[str]:
    return __all__
