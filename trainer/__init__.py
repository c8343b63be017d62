"""The second stage: sparse autoencoders, trained from a dataset's rows. `Sae` is the way in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from winnow.sae.model import Sae as Sae

__all__ = ["Sae"]


def __getattr__(name: str) -> Any:  # `python -m trainer` tidies sys.path before anything else is imported
    if name == "Sae":
        from winnow.sae.model import Sae

        return Sae
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
