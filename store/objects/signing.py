"""Headers of a put whose SHA-256 is known, signed with the client's keys.

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
"""Environment variables with which obstore would send more headers than these."""


def put_headers(url: SplitResult, sha256: str, keys: Keys | None) -> dict[str, str] | None:
    """Sign a put that creates an object (If-None-Match: *).

    Args:
        url: A URL that the client signed for this put: time, region and key are taken from it.
        sha256: The payload's digest in hex.
        keys: The client's keys.

    Returns:
        All headers but Content-Length; None if the URL is unsigned or its keys were renewed meanwhile.
    """
    # The signed URL itself will not do: it leaves the payload unsigned, so S3 would not check its digest.
    query = {name: values[0] for name, values in parse_qs(url.query).items()}
    key, _, scope = query.get("X-Amz-Credential", "").partition("/")
    token, known = query.get("X-Amz-Security-Token", ""), keys.given() if keys else None
    # `given` may be newer than the URL: mixing two sets of keys would be a signature that nobody accepts.
    if known is None or (key, token) != (known["access_key_id"], known.get("token") or ""):
        return None
    headers = {
        "host": url.netloc,
        "if-none-match": "*",
        "x-amz-content-sha256": sha256,
        "x-amz-date": query["X-Amz-Date"],
        **({"x-amz-security-token": token} if token else {}),
    }
    names = ";".join(headers)  # Signature Version 4 wants them sorted: the literal above is
    lines = (f"{name}:{value}" for name, value in headers.items())
    # The empty line is the query string: nothing of the signed URL's is sent.
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
