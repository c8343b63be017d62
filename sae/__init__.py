"""The sparse autoencoder: model, codes, initialisation, metrics, and the files of other libraries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.common.lazy import lazy_getattr

if TYPE_CHECKING:
    from winnow.sae.model import Sae as Sae
    from winnow.sae.sets import TranscoderSet as TranscoderSet

__all__ = ["Sae", "TranscoderSet"]  # pyright: ignore[reportUnsupportedDunderAll]

# Lazy, since importing the package alone must not load torch, which takes seconds.
__getattr__ = lazy_getattr(__name__, {"Sae": "winnow.sae.model", "TranscoderSet": "winnow.sae.sets"})


def __dir__() -> list[str]:
    return __all__
