"""Opening a root by its address."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote

from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import ConfigError
from winnow.store.objects.base import ObjectStore


def open_store(uri: str | os.PathLike[str], storage: StorageSpec | None = None) -> ObjectStore:
    """Open the object store at `uri`.

    Args:
        uri: A local path, `file:///...`, or `s3://bucket/prefix`.
        storage: Time-outs and permissions.

    Raises:
        ConfigError: Another scheme, or one with a single slash, no bucket, or a plain `http://` endpoint
            beyond loopback.
        StoreError: S3 credentials are missing.
    """
    # Imported when needed: a training step alone needs this package's types, on machines without obstore.
    from winnow.store.objects.local import LocalStore
    from winnow.store.objects.s3 import open_s3

    uri, storage = os.fspath(uri), storage or StorageSpec()
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    # `Path("s3://bucket/x")` is `s3:/bucket/x`: as a folder it would take the data without a word.
    if slipped := re.match(r"(s3|file):/(?!/)", uri, re.IGNORECASE):
        raise ConfigError(
            f"root {uri!r} has one slash",
            expected="s3://bucket/prefix or file:///absolute/path, as text: a Path takes slashes out",
            got=slipped[0],
            fix=f"Put ./ before it if it is a folder called {slipped[1]}:",
        )
    if scheme is None:
        return LocalStore(uri)
    if scheme[1].lower() == "file":
        machine, slash, path = uri[len("file://") :].partition("/")
        if machine not in ("", "localhost") or not slash:
            raise ConfigError(f"root {uri!r} names another machine", expected="file:///absolute/path")
        # Not by `urlsplit`: `#` and `?` are ordinary letters of a path, and it would cut the path there.
        return LocalStore(unquote(f"/{path}"))
    if scheme[1].lower() == "s3":
        bucket, _, prefix = uri[len("s3://") :].partition("/")
        return open_s3(bucket, prefix.strip("/"), storage)
    raise ConfigError(
        f"root has the scheme {scheme[1]!r}", expected="a local path, file:// or s3://", got=f"{scheme[1]}://"
    )
