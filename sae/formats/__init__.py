"""Other libraries' files for sparse autoencoders: a file a format; `convert` is the way in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.common.lazy import lazy_getattr

if TYPE_CHECKING:
    from winnow.sae.formats.convert import export_sae as export_sae
    from winnow.sae.formats.convert import import_sae as import_sae

__all__ = ["export_sae", "import_sae"]  # pyright: ignore[reportUnsupportedDunderAll]

# Lazy, since importing one format must not load all of them.
__getattr__ = lazy_getattr(
    __name__, dict.fromkeys(("export_sae", "import_sae"), "winnow.sae.formats.convert")
)


def __dir__() -> list[str]:
    return __all__
