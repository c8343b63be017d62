"""What AWS's own configuration says of S3, apart from keys: used, or named in a warning."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from pathlib import Path

import obstore
import pytest

from winnow.store.objects import keys, open_store
from winnow.store.objects.s3_store import S3Store


@pytest.fixture(autouse=True)
def _only_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    keys._warn_unused.cache_clear()


def asked(tmp_path: Path, *lines: str, bucket: str = "buck") -> str:
    """The URL without its query that a request for `p/k` goes to."""
    (tmp_path / "config").write_text("\n".join(("[default]", "region = eu-west-1", *lines)))
    store = open_store(f"s3://{bucket}/p")
    assert isinstance(store, S3Store)
    return obstore.sign(store._client, "GET", store._path("k"), timedelta(seconds=60)).partition("?")[0]


VIRTUAL = ("s3 =", "    addressing_style = virtual")
PLACES = {
    "AWS itself": ((), "https://s3.eu-west-1.amazonaws.com/buck/p/k"),
    "AWS itself, virtual": (VIRTUAL, "https://buck.s3.eu-west-1.amazonaws.com/p/k"),
    "path is what it is": (
        ("s3 =", "    addressing_style = path"),
        "https://s3.eu-west-1.amazonaws.com/buck/p/k",
    ),
    "an endpoint": (("endpoint_url = https://o.example:9/",), "https://o.example:9/buck/p/k"),
    "an endpoint, virtual": (
        ("endpoint_url = https://o.example:9/", *VIRTUAL),
        "https://buck.o.example:9/p/k",
    ),
    "the bucket is in it": (
        ("endpoint_url = https://buck.o.example", *VIRTUAL),
        "https://buck.o.example/p/k",
    ),
    "an address has no such names": (
        ("endpoint_url = https://10.0.0.1", *VIRTUAL),
        "https://10.0.0.1/buck/p/k",
    ),
    "of S3 only": (
        ("services = mine", "[services mine]", "s3 =", "    endpoint_url = https://s.example"),
        "https://s.example/buck/p/k",
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_requests_go_where_the_profile_says(tmp_path: Path, place: str, caplog) -> None:
    lines, expected = PLACES[place]
    assert asked(tmp_path, *lines) == expected
    assert not caplog.records


def test_the_environment_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "false")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://e.example")
    assert asked(tmp_path, "endpoint_url = https://o.example", *VIRTUAL) == "https://e.example/buck/p/k"


def test_settings_that_are_not_used_are_named_once(tmp_path: Path, caplog) -> None:
    lines = (
        "use_fips_endpoint = true",
        "s3 =",
        "    use_accelerate_endpoint = true",
        "    max_concurrent_requests = 9",
    )
    with caplog.at_level(logging.WARNING, logger="winnow.store"):
        asked(tmp_path, *lines)
        asked(tmp_path, *lines)
    (record,) = caplog.records
    said = record.getMessage()
    assert "s3.use_accelerate_endpoint = True, use_fips_endpoint = True" in said
    assert "max_concurrent" not in said


def test_a_profile_that_is_not_there_ends_nothing_with_all_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "a"),
        ("AWS_SECRET_ACCESS_KEY", "b"),
        ("AWS_REGION", "r"),
        ("AWS_ENDPOINT_URL", "https://e.example"),
        ("AWS_PROFILE", "gone"),
    ):
        monkeypatch.setenv(name, value)
    assert asked(tmp_path) == "https://e.example/buck/p/k"
