"""S3's region, endpoint and keys: from the environment, otherwise from AWS's own configuration.

botocore reads `AWS_PROFILE`, the files in `~/.aws`, web identities, and the roles of containers and
instances. Keys stay in this process's memory: they are neither stored nor pickled.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

from winnow.common.paths import expand_user
from winnow.schemas.errors import StoreError

if TYPE_CHECKING:
    from obstore.store import S3Credential

# botocore renews keys that are valid for less than ten minutes more: asked every five, it never returns keys
# that expire before it is asked again.
RENEW = timedelta(minutes=5)
"""Time after which keys are asked for again."""
log = logging.getLogger("winnow.store")
TRUE = ("1", "true", "yes", "on", "y", "t")
"""How obstore's switches in the environment are spelt when they are on."""


class Keys:
    """The keys of one client, renewed in time. obstore calls it; `given` returns what it got last.

    Args:
        ask: Returns (key, secret, token).
    """

    def __init__(self, ask: Callable[[], tuple[str, str, str | None]]) -> None:
        self._ask, self._given = ask, None

    _given: S3Credential | None

    def __call__(self) -> S3Credential:
        """Ask for the current keys, for obstore."""
        key, secret, token = self._ask()
        self._given = {
            "access_key_id": key,
            "secret_access_key": secret,
            "token": token,
            "expires_at": datetime.now(UTC) + RENEW,
        }
        return self._given

    def given(self) -> S3Credential | None:
        """Return the keys that the client signs with now; None before it asked."""
        return self._given

    def conceal(self, text: str) -> str:
        """Return `text` with every key replaced."""
        # "\0" stands for an absent token: replacing an empty string would put stars between all letters.
        for name in ("secret_access_key", "token", "access_key_id") if self._given else ():
            text = text.replace(self._given[name] or "\0", "***")  # pyright: ignore
        return text

    def __repr__(self) -> str:
        return "<Keys>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("keys are never pickled")


def find_keys() -> Keys | None:
    """Find the keys to sign requests with; None if the environment says that they are not signed.

    Raises:
        StoreError: There are no keys, or they cannot be read; raised within seconds.
    """
    env = os.environ
    if env.get("AWS_SKIP_SIGNATURE", "").lower() in TRUE:
        return None
    key, secret = env.get("AWS_ACCESS_KEY_ID"), env.get("AWS_SECRET_ACCESS_KEY")
    if key and secret:
        token = env.get("AWS_SESSION_TOKEN") or env.get("AWS_TOKEN")  # obstore takes either name
        keys = Keys(lambda: (key, secret, token))
    elif key or secret:
        raise _missing(f"no {'AWS_SECRET_ACCESS_KEY' if key else 'AWS_ACCESS_KEY_ID'}")
    else:
        keys = Keys(_configured())
    # Asked once now, so that missing or expired keys are an error within seconds, not of a first request.
    keys()
    return keys


def _configured() -> Callable[[], tuple[str, str, str | None]]:
    from botocore.credentials import Credentials  # pyright: ignore[reportMissingTypeStubs]

    with _as_store_errors():
        found = _aws_session().get_credentials()
    if found is None:
        raise _missing("no AWS_ACCESS_KEY_ID, no profile in ~/.aws and no instance role")

    # botocore renews roles and the like, and reads a file once; sign-in tools rewrite it every hour.
    renews = type(found) is not Credentials

    def ask() -> tuple[str, str, str | None]:
        nonlocal found
        if not renews:
            # Caught half-written, the file is read again next time.
            with suppress(StoreError), _as_store_errors():
                found = _aws_session().get_credentials() or found
        with _as_store_errors():
            now = found.get_frozen_credentials()
        return now.access_key, now.secret_key, now.token

    return ask


def _missing(got: str) -> StoreError:
    return StoreError(
        "S3 credentials are missing",
        expected="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, a profile that AWS_PROFILE "
        "names, or an instance role",
        got=got,
        fix="Set them, then run the same command again",
    )


def aws_setting(name: str) -> str | None:
    """Look up `region` or `endpoint_url` of the profile in use, for S3; None if it does not set it."""
    from botocore.configprovider import ConfiguredEndpointProvider  # pyright: ignore[reportMissingTypeStubs]

    with _as_store_errors():
        session = _aws_session()
        if name == "region":
            return session.get_config_variable("region")
        if session.get_config_variable("ignore_configured_endpoint_urls"):
            return None
        # As botocore does for its own clients: also a `[services]` section and AWS_ENDPOINT_URL_S3.
        told = session.get_scoped_config()
        return ConfiguredEndpointProvider(session.full_config, told, "s3").provide()


def asks_for_virtual_host() -> bool:
    """Return whether the profile in use wants the bucket in the host's name (`addressing_style: virtual`).

    Settings of the profile that change which endpoint is used, or how requests are signed, and that Winnow
    does not use are named in a warning, once per process.
    """
    named = os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config"
    if not expand_user(named).is_file():
        return False  # without importing botocore
    from botocore.exceptions import BotoCoreError  # pyright: ignore[reportMissingTypeStubs]

    # With keys and endpoint in the environment, a file that cannot be read was no error before either.
    with suppress(BotoCoreError):
        session = _aws_session()
        told: dict[str, Any] = session.get_config_variable("s3") or {}
        found: dict[str, Any] = {f"s3.{name}": told.get(name) for name in _UNUSED_S3} | {
            name: session.get_config_variable(name) for name in _UNUSED
        }
        if told.get("signature_version") not in (None, "s3v4"):
            found["s3.signature_version"] = told["signature_version"]
        if unused := [f"{name} = {value}" for name, value in found.items() if value]:
            _warn_unused(", ".join(unused))
        return told.get("addressing_style") == "virtual"
    return False


# Of FIPS and the like a user must know that they do not apply. Checksums, retries and time-outs of a profile
# are not among them: Winnow has its own, at least as strict.
_UNUSED_S3 = ("use_accelerate_endpoint", "payload_signing_enabled")
_UNUSED = ("use_fips_endpoint", "use_dualstack_endpoint")


@cache
def _warn_unused(settings: str) -> None:
    log.warning(
        "settings of AWS's configuration that Winnow does not use: %s. If it must be another endpoint, "
        "name it with AWS_ENDPOINT_URL",
        settings,
    )


def _aws_session() -> Any:
    """Return botocore's view of environment and files."""
    # Imported late: with keys in the environment nothing needs botocore.
    import botocore.session  # pyright: ignore[reportMissingTypeStubs]

    return botocore.session.Session()


@contextmanager
def _as_store_errors():
    """Raise botocore's errors (no such profile, an unreadable file, an expired sign-in) as StoreError."""
    from botocore.exceptions import BotoCoreError  # pyright: ignore[reportMissingTypeStubs]

    try:
        yield
    except BotoCoreError as error:
        # Its first line only, and no cause: the rest may quote what the files contain.
        raise StoreError(
            "S3 credentials cannot be read from AWS's configuration",
            got=str(error).splitlines()[0],
            fix="Check AWS_PROFILE and the files in ~/.aws, or sign in again",
        ) from None
