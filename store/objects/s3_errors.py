"""Reasons of failed S3 requests, in words, and what to do about them."""

from __future__ import annotations

import os
import re

from obstore.exceptions import NotSupportedError, PermissionDeniedError, UnauthenticatedError

_URL = re.compile(r"https?://\S+")

# A refused listing comes as obstore's generic error, which only its text tells from others.
_REFUSED = re.compile(
    r"AccessDenied|SignatureDoesNotMatch|InvalidAccessKeyId|ExpiredToken|InvalidToken|RequestTimeTooSkewed|"
    r"status code: 40[13]"
)
# What obstore has tried again itself: connections refused or broken, time-outs, 429 and 5xx.
_RETRIED = re.compile(r"after [1-9]\d* retries")
_MISSING_FEATURE = "NotImplemented|MethodNotAllowed|status code: (405|501)"
_FULL = "QuotaExceeded|StorageFull|InsufficientStorage|InsufficientCapacity|status code: 507"
# obstore tries every 5xx again; these two say something lasting.
_LASTING = re.compile(f"{_MISSING_FEATURE}|{_FULL}")

_FIXES = (
    (
        "RequestTimeTooSkewed|RequestExpired",
        "Set this machine's clock: it differs from the server's by more than S3 allows",
    ),
    (
        "ExpiredToken|TokenRefreshRequired|InvalidToken",
        "Renew the credentials, whose session token is no longer valid; then run the same command again",
    ),
    (
        "PermanentRedirect|TemporaryRedirect|AuthorizationHeaderMalformed|configured region|"
        "status code: 30[12378]",
        "Set AWS_REGION to the bucket's region, and AWS_ENDPOINT_URL to the endpoint that serves it",
    ),
    (_FULL, "Free space on the server, or raise the quota; then run the same command again"),
    (
        "[Vv]irtual.hosted",
        "Set AWS_VIRTUAL_HOSTED_STYLE_REQUEST=true and AWS_ENDPOINT_URL=https://BUCKET.HOST",
    ),
    ("Content-MD5|x-amz-checksum", "Set AWS_CHECKSUM_ALGORITHM=SHA256: the server asks for a checksum"),
    (f"{_MISSING_FEATURE}|the server lists", "Use a store that implements this part of S3"),
    (
        "Header missing|non-partial response|CONTENT_RANGE|wrong length|Content-Encoding",
        "Reach the server without a proxy that rewrites replies (compression, caching), or use another store",
    ),
)
"""Pattern of a reason -> what to do. The first match counts."""


def describe_failure(error: Exception) -> str:
    """Describe an obstore error in one line, with the S3 code if it has one, and no credential."""
    # After "Debug source" obstore repeats the error in full, which can quote signed headers.
    text = str(error)
    code, message = re.search(r"<Code>(.*?)</Code>", text), re.search(r"<Message>(.*?)</Message>", text)
    if code:
        text = f"{code[1]}: {message[1]}" if message else code[1]
    else:
        text = re.split(r"\n\nDebug source|\nDebug source", text)[0]
    text = " ".join(text.split())[:300]
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_TOKEN", "AWS_ACCESS_KEY_ID"):
        value = os.environ.get(name)
        if value:
            text = text.replace(value, "***")
    return text


def is_outage(error: Exception) -> bool:
    """Return whether the server may only be away: asked again in vain, and without a lasting reason."""
    return bool(_RETRIED.search(str(error))) and not _LASTING.search(_said(error))


def is_missing_feature(error: Exception) -> bool:
    """Return whether the server, or obstore, does not implement the request."""
    return isinstance(error, (NotImplementedError, NotSupportedError)) or bool(
        re.search(_MISSING_FEATURE, _said(error))
    )


def is_refused(error: Exception) -> bool:
    """Return whether the server refuses the credentials, or their rights."""
    kinds = (PermissionDeniedError, UnauthenticatedError)
    return isinstance(error, kinds) or bool(_REFUSED.search(_said(error)))


def advice(error: Exception) -> str:
    """Say what to do about a failed request."""
    said = _said(error)
    for pattern, fix in _FIXES:
        if re.search(pattern, said):
            return fix
    if is_refused(error):
        return "Check the credentials, their rights on this bucket (also to list it), and AWS_REGION"
    return "Check AWS_ENDPOINT_URL and the network, raise storage.timeout_seconds for slow links"


def _said(error: Exception) -> str:
    """Return status, S3 code and message, without the URL, whose names and numbers are the user's."""
    status = re.search(r"status code: \d{3}", str(error))
    return f"{status[0] if status else ''} {_URL.sub('', describe_failure(error))}"
