"""Checks of every request before it reaches the API, and headers of every reply.

- Host: on loopback only loopback names are answered, so that a page of another site cannot reach us by
  pointing its own name here (DNS rebinding).
- Origin: a request that a browser sends from another site is refused.
- Token: if the server listens beyond loopback, the token is passed once in the URL and kept in a cookie.
- Size: bodies beyond a limit are refused unread.
- A content security policy that allows our own files and nothing else; of a page below `/embed/`, that pages
  of this machine frame it.
"""

from __future__ import annotations

import hmac
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from winnow.explorer.site.refusal import refuse

# The largest honest body is a text of 4,000 characters, up to 48 kB if JSON escapes every one of them.
_MAX_BODY_BYTES = 64 * 1024
_COOKIE = "winnow_token"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    # The address may hold the token (before the redirect) and always the text that is read.
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # After an upgrade an old script would talk to a new API.
    "Cache-Control": "no-store",
}
EMBED = "/embed/"
"""What the paths of pages that may be framed begin with."""
# Pages of this machine only, such as a notebook's: any other site that is open in the browser could frame an
# address of loopback too. The page has no script; its styles are attributes.
_EMBED_HEADERS = _HEADERS | {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self' http://127.0.0.1:* http://localhost:*",
}


class Gate:
    """ASGI middleware; see the module's docstring.

    Args:
        app: The application behind it.
        token: Required of every request; None on loopback, where the Host is checked instead.
    """

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, refuse or pass a request on."""
        # The site has no websockets, and a kind of connection that is not checked is not let through.
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                framed = scope["path"].startswith(EMBED)
                MutableHeaders(scope=message).update(_EMBED_HEADERS if framed else _HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        # Refusals carry the headers too: an error page must not be framed or cached either.
        if refusal is not None:
            await refusal(scope, receive, send_guarded)
            return
        await self._app(scope, _bounded(receive), send_guarded)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """The reply to a request that does not pass; None if it passes."""
        # Host first: after DNS rebinding the Origin agrees with the Host, and only the name is wrong.
        host = headers.get("host", "")
        if self._token is None and _name(host) not in LOOPBACK:
            return refuse(scope, 421, "This server answers to loopback names only, such as http://127.0.0.1")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return refuse(scope, 403, "Requests from other sites are refused")
        length = headers.get("content-length", "0")
        # At most 12 digits: `int` raises on a number of more than 4,300, which would be a server error.
        if not length.isdecimal() or len(length) > 12 or int(length) > _MAX_BODY_BYTES:
            return refuse(scope, 413, f"A request's body is at most {_MAX_BODY_BYTES} bytes")
        return self._without_token(scope, headers)

    def _without_token(self, scope: Scope, headers: Headers) -> Response | None:
        if self._token is None:
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"))
        given = dict(query).get("token")
        # Redirected to the same address without it, so that the token stays in no history or bookmark.
        if given is not None and self._right(given):
            rest = urlencode([(key, value) for key, value in query if key != "token"])
            reply = RedirectResponse("/" + (f"?{rest}" if rest else ""), 303)
            reply.set_cookie(_COOKIE, self._token, httponly=True, samesite="strict")
            return reply
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if self._right(bearer) or self._right(_cookie(headers.get("cookie", ""))):
            return None
        return refuse(
            scope, 401, "This server needs its token: open the address that it printed when it started"
        )

    def _right(self, given: str) -> bool:
        # In constant time: a comparison that stops at the first difference tells how much was right.
        return self._token is not None and hmac.compare_digest(given.encode(), self._token.encode())


def _name(host: str) -> str:
    """The host's name without its port; empty if it is malformed, such as `[::1`."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _cookie(header: str) -> str:
    """The token in a Cookie header; empty if there is none or the header is malformed."""
    try:
        morsel = SimpleCookie(header).get(_COOKIE)
    except CookieError:
        return ""
    return morsel.value if morsel else ""


def _bounded(receive: Receive) -> Receive:
    """Wrap `receive` so that a body without a length ends once it passes the limit."""
    # Chunked bodies have no Content-Length to refuse them by.
    seen = 0

    async def bounded() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > _MAX_BODY_BYTES:
            return {"type": "http.disconnect"}
        return message

    return bounded
