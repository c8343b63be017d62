"""Objects under a root: one interface over a local folder and S3."""

from winnow.store.objects.base import (
    MAX_GET_BYTES,
    MAX_KEY,
    Data,
    Digest,
    ObjectStore,
    Pieces,
    Ready,
    check_key,
    joined,
)
from winnow.store.objects.open import open_store

__all__ = [
    "MAX_GET_BYTES",
    "MAX_KEY",
    "Data",
    "Digest",
    "ObjectStore",
    "Pieces",
    "Ready",
    "check_key",
    "joined",
    "open_store",
]
