"""The data plane: manifests, zarr and object storage. `ActivationStore` is the way in."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from winnow.store.read.reader import ActivationStore

__all__ = ["ActivationStore"]


def __getattr__(name: str) -> Any:
    """`ActivationStore`, loaded when asked for: a machine that only computes need not have zarr."""
    if name != "ActivationStore":
        raise AttributeError(f"module 'store' has no attribute {name!r}")
    from winnow.store.read.reader import ActivationStore

    return ActivationStore
