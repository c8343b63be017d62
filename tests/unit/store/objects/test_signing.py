"""A put's signature against botocore's, for the same second."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, urlsplit

import botocore.auth
import obstore
import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from obstore.store import S3Store as ObstoreS3

from tests.conftest import only_aws
from winnow.store.objects.keys import find_keys
from winnow.store.objects.signing import put_headers

SHA256 = "0123456789abcdef" * 4


@pytest.fixture(params=[None, "to/ken+=="])
def keys(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Credentials:
    """Keys of the environment, with and without a session's token."""
    only_aws(
        monkeypatch,
        {
            "AWS_ACCESS_KEY_ID": "some-key",
            "AWS_SECRET_ACCESS_KEY": "some/secret+",
            **({"AWS_SESSION_TOKEN": request.param} if request.param else {}),
        },
    )
    return Credentials("some-key", "some/secret+", request.param)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9000", "https://storage.example.org", None])
def test_the_signature_is_botocores(
    keys: Credentials, endpoint: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"region": "eu-west-2", **({"endpoint": endpoint} if endpoint else {})}
    given = find_keys()
    client = ObstoreS3(
        "bucket", config=config, credential_provider=given, client_options={"allow_http": True}
    )
    signed = obstore.sign(client, "PUT", "data set/c/0/0", timedelta(minutes=1))
    url = urlsplit(signed)
    when = datetime.strptime(parse_qs(url.query)["X-Amz-Date"][0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda: when)

    class Known(S3SigV4Auth):
        def payload(self, request: AWSRequest) -> str:
            return SHA256

    request = AWSRequest("PUT", signed.partition("?")[0], headers={"If-None-Match": "*"})
    Known(keys, "s3", "eu-west-2").add_auth(request)

    found = put_headers(url, SHA256, given)
    assert found is not None
    theirs = {name.lower(): value for name, value in request.headers.items()}
    authorization = theirs.pop("authorization").replace(", ", ",")
    assert found.pop("authorization") == authorization
    assert found.pop("host") == url.netloc
    assert found == theirs


def test_a_url_that_nobody_signed(keys: Credentials) -> None:
    assert put_headers(urlsplit("http://127.0.0.1:9000/bucket/key"), SHA256, find_keys()) is None
