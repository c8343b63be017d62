"""The data plane: manifests, zarr and object storage. `ActivationStore` is the way in."""

from store.reader import ActivationStore

__all__ = ["ActivationStore"]
