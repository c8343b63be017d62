"""Opening S3: bucket, endpoint, credentials, and a client with the configured time-outs and retries."""

from __future__ import annotations

import ipaddress
import os
import re
import unicodedata
from datetime import timedelta
from typing import Any, cast
from urllib.parse import urlsplit

from obstore.store import S3Store as ObstoreS3

from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import ConfigError
from winnow.store.objects.base import MAX_KEY
from winnow.store.objects.direct import Direct
from winnow.store.objects.keys import TRUE, asks_for_virtual_host, aws_setting, find_keys
from winnow.store.objects.s3_store import S3Store

_MAX_PREFIX_BYTES = 1024 - MAX_KEY - 1
"""Longest prefix of a root."""
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")


def open_s3(bucket: str, prefix: str, storage: StorageSpec) -> S3Store:
    """Open a bucket's objects under a prefix; see `winnow.store.objects.open_store`."""
    if not _BUCKET.fullmatch(bucket):
        raise ConfigError(
            "root does not name an S3 bucket",
            expected="s3://bucket/prefix with a bucket of 3 to 63 letters, digits, '.', '-'",
            # A URI with a password in it is not quoted: messages end up in logs.
            got="credentials inside the URI" if "@" in bucket or ":" in bucket else repr(bucket[:80]),
            fix="Credentials belong in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)",
        )
    _check_prefix(prefix)
    env = os.environ
    endpoint, plain = s3_endpoint(storage.allow_http)
    keys = find_keys()
    wait = timedelta(seconds=storage.timeout_seconds)
    # obstore retries with the credentials of the first try: its documentation asks for less than five
    # minutes, so that they do not expire meanwhile.
    limit = min(3 * wait, timedelta(minutes=4))
    region = env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or aws_setting("region")
    # A request is signed for some region; servers other than AWS take any.
    config: dict[str, Any] = {"region": region or "us-east-1"}
    virtual = "AWS_VIRTUAL_HOSTED_STYLE_REQUEST" not in env and asks_for_virtual_host()
    if endpoint:
        endpoint = endpoint.rstrip("/")
        if virtual:
            endpoint, virtual = _with_bucket(endpoint, bucket)
        config["endpoint"] = endpoint
    if virtual:
        config["virtual_hosted_style_request"] = True
    client = ObstoreS3(
        bucket,
        config=cast(Any, config),
        credential_provider=keys,
        client_options={
            "timeout": wait,
            "read_timeout": wait,
            # A server that does not accept within seconds is down; long waits are for slow replies.
            "connect_timeout": min(wait, timedelta(seconds=10)),
            "allow_http": plain,
        },
        retry_config={
            "max_retries": 6,
            "retry_timeout": limit,
            "backoff": {
                "init_backoff": timedelta(milliseconds=100),
                "max_backoff": timedelta(seconds=5),
                "base": 2,
            },
        },
    )
    direct = Direct(client, keys, storage.timeout_seconds)
    return S3Store(client, bucket, prefix, direct, limit.total_seconds(), storage.single_writer)


def _with_bucket(endpoint: str, bucket: str) -> tuple[str, bool]:
    """Put the bucket before an endpoint's host; unchanged, and False, if the host is an address."""
    parts = urlsplit(endpoint)
    host = parts.hostname or ""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        # The client expects the bucket in the endpoint that it is given.
        named = parts.netloc if host.startswith(f"{bucket}.".lower()) else f"{bucket}.{parts.netloc}"
        return parts._replace(netloc=named).geturl(), True
    return endpoint, False


def _check_prefix(prefix: str) -> None:
    """Raise ConfigError if a root's prefix cannot begin the keys of its objects; S3 takes all others."""
    wrong = ""
    # The S3 client and URLs normalise empty names, `.` and `..` away; the client refuses control characters.
    if prefix and not {"", ".", ".."}.isdisjoint(prefix.split("/")):
        wrong = "a name that is empty, '.' or '..' between two slashes"
    elif any(unicodedata.category(letter) in ("Cc", "Cs") for letter in prefix):
        wrong = "a control character, or one that is no Unicode"
    elif len(prefix.encode()) > _MAX_PREFIX_BYTES:
        wrong = f"{len(prefix.encode())} bytes"
    if wrong:
        raise ConfigError(
            f"root has the prefix {prefix[:80]!r}",
            expected=f"names between single slashes, at most {_MAX_PREFIX_BYTES} bytes (a key has 1,024, of "
            f"which the store's own names may take {MAX_KEY})",
            got=wrong,
        )


def s3_endpoint(allow_http: bool) -> tuple[str | None, bool]:
    """Find the S3 endpoint of environment or profile (None: AWS itself), and whether it is plain HTTP."""
    env = os.environ
    named = env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or env.get("AWS_ENDPOINT")
    endpoint = named or aws_setting("endpoint_url")
    # Of obstore's own variables, with its spellings of true: most commands on runs and SAEs have no config.
    allow_http = allow_http or env.get("AWS_ALLOW_HTTP", "").lower() in TRUE
    return endpoint, check_endpoint(endpoint, allow_http) if endpoint else False


def check_endpoint(endpoint: str, allow_http: bool) -> bool:
    """Return whether an endpoint is plain HTTP; ConfigError if it must not be, or is no URL."""
    parts = urlsplit(endpoint)
    host = parts.hostname or ""
    if parts.scheme not in ("http", "https") or not host or parts.username is not None:
        # Not quoted, since it may contain a password.
        raise ConfigError(
            "AWS_ENDPOINT_URL is not an endpoint", expected="https://host[:port], without user or password"
        )
    if parts.scheme == "https":
        return False
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name and not an address: it may resolve to anything
        loopback = False
    if not (loopback or allow_http):
        raise ConfigError(
            f"AWS_ENDPOINT_URL is plain http:// to {host}",
            expected="https://, or http:// to this machine's loopback",
            fix="Use https; where the network is trusted, set storage.allow_http: true in the config, or "
            "AWS_ALLOW_HTTP=true in the environment",
        )
    return True
