"""Asks a language model behind an OpenAI-compatible endpoint: chat completions, checked and bounded."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from winnow.schemas.errors import ConfigError, EndpointError
from winnow.schemas.evaluation import JudgeSpec

# An answer is a sentence or a short list; a longer reply is cut off rather than read into memory.
_MAX_REPLY_BYTES = 1 << 20
_TRIES = 5
"""Times that a request is sent while the endpoint is busy or fails (408, 429, 5xx, no connection)."""
# Plain http is acceptable only to these: nobody else sees the key on its way.
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Endpoint:
    """A model that answers questions. It may be used from several threads.

    Args:
        spec: Address and model.
        key: Bearer token; never stored, shown or sent to another machine without TLS.

    Raises:
        ConfigError: The address is not http(s), or a key would be sent unencrypted.
    """

    def __init__(self, spec: JudgeSpec, key: str | None = None) -> None:
        # A user name or a query in the address is refused, as it may be a secret: the address is stored and
        # printed.
        parts = urlsplit(spec.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ConfigError("judge.endpoint", expected="such as https://HOST/v1", got=spec.endpoint)
        if key and parts.scheme == "http" and parts.hostname not in LOOPBACK:
            raise ConfigError("judge.endpoint", expected="https, since a key is sent", got=spec.endpoint)
        self.spec, self._url = spec, spec.endpoint.rstrip("/") + "/chat/completions"
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.tokens = 0
        """Tokens that the endpoint reports to have read and written."""
        self.requests = 0
        """Number of its answers."""
        retry = Retry(
            _TRIES - 1,
            backoff_factor=0.5,
            status_forcelist=(408, 429, 500, 502, 503, 504),
            # None is every method: urllib3 does not repeat a POST by itself, but a question changes nothing.
            allowed_methods=None,
            # The last reply is needed for the message, in place of urllib3's MaxRetryError.
            raise_on_status=False,
            respect_retry_after_header=True,
        )
        self._session = requests.Session()
        # requests would otherwise take credentials from a netrc and send the key to a proxy of the
        # environment.
        self._session.trust_env = False
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=spec.parallel))

    def ask(self, system: str, user: str) -> str:
        """Ask one question, at temperature 0, and return the answer.

        Raises:
            ConfigError: The endpoint refuses (400, 401, 403, 404, ...).
            EndpointError: It cannot be reached, stays busy, or does not answer as OpenAI's API does.
        """
        # Temperature 0, so that figures repeat as far as the endpoint allows.
        body = {
            "model": self.spec.model,
            "temperature": 0,
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
        }
        try:
            with self._session.post(
                self._url,
                json=body,
                headers=self._headers,
                timeout=self.spec.timeout_seconds,
                # Streamed, so that a huge reply can be cut off; not redirected, so that key and text reach no
                # other host than the configured one.
                stream=True,
                allow_redirects=False,
            ) as reply:
                data = reply.raw.read(_MAX_REPLY_BYTES + 1, decode_content=True)
                status = reply.status_code
        except (requests.RequestException, OSError) as error:
            raise EndpointError(
                f"{self._url} does not answer",
                got=type(error).__name__,
                fix="Check judge.endpoint, or raise judge.timeout_seconds",
            ) from error
        if status != 200:
            said = data[:200].decode(errors="replace")
            # Busy or broken is the endpoint's fault and may pass; any other refusal is due to the config.
            kind = EndpointError if status >= 500 or status in (408, 429) else ConfigError
            raise kind(f"{self._url} refuses", expected="status 200", got=f"{status}: {said}")
        try:
            found: Any = json.loads(data[:_MAX_REPLY_BYTES])
            text = found["choices"][0]["message"]["content"]
            used = (found.get("usage") or {}).get("total_tokens") or 0
            self.tokens += int(used)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise EndpointError(
                f"{self._url} does not answer as a chat completion", got=data[:200].decode(errors="replace")
            ) from error
        self.requests += 1
        if not isinstance(text, str):
            raise EndpointError(f"{self._url} gives no text", got=repr(text)[:200])
        return text
