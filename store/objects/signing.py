"""The headers of a put whose SHA-256 is known, signed with the client's keys.

Source: "Signature Calculations for the Authorization Header: Transferring Payload in a Single Chunk (AWS
Signature Version 4)" in the S3 API reference.
"""

from __future__ import annotations

import hmac
import re
from functools import reduce
from urllib.parse import SplitResult, parse_qs

from winnow.schemas.base import sha256_hex
from winnow.store.objects.keys import Keys

OTHER_HEADERS = re.compile(
    r"AWS_(SERVER_SIDE_ENCRYPTION|SSE_\w+|CHECKSUM_ALGORITHM|REQUEST_PAYER|S3_EXPRESS|UNSIGNED_PAYLOAD|"
    r"CONDITIONAL_PUT)",
    re.IGNORECASE,
)
"""Settings of the environment that ask for other headers than these."""


def put_headers(url: SplitResult, sha256: str, keys: Keys | None) -> dict[str, str] | None:
    """Headers of a put that creates an object (If-None-Match: *), the Content-Length left out.

    Args:
        url: Where it goes, signed for a put by the client whose signature this one stands for: it tells when,
            for which region and with whose key.
        sha256: The payload's digest in hex.
        keys: What the client signs with.

    Returns:
        None where the URL was signed with other keys, which were renewed meanwhile, or with none.
    """
    query = {name: values[0] for name, values in parse_qs(url.query).items()}
    key, _, scope = query.get("X-Amz-Credential", "").partition("/")
    token, known = query.get("X-Amz-Security-Token", ""), keys.given() if keys else None
    if known is None or (key, token) != (known["access_key_id"], known.get("token") or ""):
        return None
    headers = {
        "host": url.netloc,
        "if-none-match": "*",
        "x-amz-content-sha256": sha256,
        "x-amz-date": query["X-Amz-Date"],
        **({"x-amz-security-token": token} if token else {}),
    }
    names = ";".join(headers)  # in order, as they must be
    lines = (f"{name}:{value}" for name, value in headers.items())
    request = "\n".join(["PUT", url.path, "", *lines, "", names, sha256])
    text = "\n".join(["AWS4-HMAC-SHA256", headers["x-amz-date"], scope, sha256_hex(request.encode())])
    signing_key = reduce(_hmac, scope.split("/"), f"AWS4{known['secret_access_key']}".encode())
    headers["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={key}/{scope},SignedHeaders={names},"
        f"Signature={_hmac(signing_key, text).hex()}"
    )
    return headers


def _hmac(key: bytes, text: str) -> bytes:
    return hmac.digest(key, text.encode(), "sha256")
