"""Opening S3: the bucket, the endpoint, the credentials, and a client that waits and tries as configured."""

from __future__ import annotations

import http.client
import ipaddress
import os
import re
from datetime import timedelta
from typing import Any, cast
from urllib.parse import urlsplit

from obstore.store import S3Store as ObstoreS3

from schemas.config import StorageSpec
from schemas.errors import ConfigError, StoreError
from store.direct import Direct
from store.objects import check_key
from store.s3_objects import S3Store

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")


def open_s3(bucket: str, prefix: str, storage: StorageSpec) -> S3Store:
    """The objects of a bucket under a prefix; see `store.objects.open_store`."""
    if not _BUCKET.fullmatch(bucket):
        raise ConfigError(
            "root does not name an S3 bucket",
            expected="s3://bucket/prefix with a bucket of 3 to 63 letters, digits, '.', '-'",
            got="credentials inside the URI" if "@" in bucket or ":" in bucket else repr(bucket[:80]),
            fix="Credentials belong in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)",
        )
    if prefix:
        check_key(prefix)
    env = os.environ
    endpoint, plain = s3_endpoint(storage.allow_http)
    _require_credentials()
    wait = timedelta(seconds=storage.timeout_seconds)
    config: dict[str, Any] = {"region": env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or "us-east-1"}
    if endpoint:
        config["endpoint"] = endpoint.rstrip("/")
    client = ObstoreS3(
        bucket,
        config=cast(Any, config),
        client_options={
            "timeout": wait,
            "read_timeout": wait,
            "connect_timeout": min(wait, timedelta(seconds=10)),
            "allow_http": plain,
        },
        retry_config={
            "max_retries": 6,
            "retry_timeout": min(3 * wait, timedelta(minutes=4)),
            "backoff": {
                "init_backoff": timedelta(milliseconds=100),
                "max_backoff": timedelta(seconds=5),
                "base": 2,
            },
        },
    )
    direct = Direct(client, storage.timeout_seconds)
    return S3Store(client, bucket, prefix, direct, storage.single_writer)


def s3_endpoint(allow_http: bool) -> tuple[str | None, bool]:
    """The environment's S3 endpoint (None: AWS itself), checked, and whether it speaks plain HTTP."""
    env = os.environ
    endpoint = env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or env.get("AWS_ENDPOINT")
    return endpoint, check_endpoint(endpoint, allow_http) if endpoint else False


def check_endpoint(endpoint: str, allow_http: bool) -> bool:
    """Whether an endpoint speaks plain HTTP; ConfigError where it must not, or is no URL."""
    parts = urlsplit(endpoint)
    host = parts.hostname or ""
    if parts.scheme not in ("http", "https") or not host or parts.username is not None:
        raise ConfigError(
            "AWS_ENDPOINT_URL is not an endpoint", expected="https://host[:port], without user or password"
        )
    if parts.scheme == "https":
        return False
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not (loopback or allow_http):
        raise ConfigError(
            f"AWS_ENDPOINT_URL is plain http:// to {host}",
            expected="https://, or http:// to this machine's loopback",
            fix="Use https, or set storage.allow_http: true where the network is trusted",
        )
    return True


def _require_credentials() -> None:
    """StoreError, within seconds, where the environment and the instance hold no S3 credentials."""
    env = os.environ
    key, secret = env.get("AWS_ACCESS_KEY_ID"), env.get("AWS_SECRET_ACCESS_KEY")
    if key and secret:
        return
    named = (
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "AWS_SKIP_SIGNATURE",
    )
    if not (key or secret) and (any(env.get(name) for name in named) or _instance_role()):
        return
    missing = "AWS_SECRET_ACCESS_KEY" if key else "AWS_ACCESS_KEY_ID"
    raise StoreError(
        "S3 credentials are missing",
        expected="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, or an instance role",
        got=f"no {missing}" + ("" if key or secret else " and no instance role"),
        fix="Set them, then run the same command again",
    )


def _instance_role() -> bool:
    """Whether the instance metadata service answers that this machine has a role (2 s a request)."""
    base = urlsplit(os.environ.get("AWS_METADATA_ENDPOINT") or "http://169.254.169.254")
    try:
        connection = http.client.HTTPConnection(base.hostname or "", base.port or 80, timeout=2)
        try:
            lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
            connection.request("PUT", "/latest/api/token", headers=lifetime)
            reply = connection.getresponse()
            token = reply.read(4096).decode("latin-1")
            if reply.status != 200:
                return False
            headers = {"X-aws-ec2-metadata-token": token}
            connection.request("GET", "/latest/meta-data/iam/security-credentials/", headers=headers)
            reply = connection.getresponse()
            return reply.status == 200 and bool(reply.read(4096).strip())
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, ValueError):
        return False
