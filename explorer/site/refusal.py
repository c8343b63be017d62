"""A reply that says no: to a program JSON, to somebody who opens an address in a browser a page."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from starlette.datastructures import Headers
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import Scope

API = "/api/"
"""What the paths of the API begin with; a browser's own requests to them are the page's script's."""
_HOME = '<p><a class="button" href="/">To the explorer</a></p>\n'
# No script, and nothing of the request: an address may be somebody else's text.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title} - Winnow</title>
<link rel="icon" href="/icon.svg">
<link rel="stylesheet" href="/style.css">
</head>
<body>
<header><a class="brand" href="/"><img src="/icon.svg" alt="" width="26" height="26">Winnow</a></header>
<main>
<h1>{title}</h1>
<p>{why}</p>
{home}</main>
</body>
</html>
"""


def refuse(scope: Scope, status: int, why: str, headers: Mapping[str, str] | None = None) -> Response:
    """The reply to a request that is not served.

    Args:
        scope: The request's; its path and its header Accept are read.
        status: HTTP status.
        why: One sentence, without its full stop.
        headers: More headers of the reply.
    """
    accepted = Headers(scope=scope).get("accept", "")
    if scope["path"].startswith(API) or "text/html" not in accepted:
        return JSONResponse({"error": why}, status, headers)
    title = "There is no such page" if status == 404 else "This cannot be shown"
    # Without the token or by another name every address of ours is refused, the first page too.
    home = "" if status in (401, 421) else _HOME
    return HTMLResponse(_PAGE.format(title=title, why=f"{escape(why)}.", home=home), status, headers)
