"""The explorer's web server: the API, the page's files, and replies to errors."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Annotated

import uvicorn
from fastapi import FastAPI, Request
from fastapi import Path as PathParameter
from fastapi.exception_handlers import request_validation_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from winnow.explorer.site.api import make_router
from winnow.explorer.site.card import Card
from winnow.explorer.site.desk import Desk
from winnow.explorer.site.gate import EMBED, Gate
from winnow.explorer.site.lane import Busy
from winnow.explorer.site.refusal import API, refuse
from winnow.schemas.errors import ConfigError, StoreError, WinnowError

log = logging.getLogger("winnow.explorer")

_STATIC = Path(__file__).parents[1] / "static"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
_NOWHERE = "The explorer has nothing at this address"
_RETRY_SECONDS = 3
_EMBEDDED_EXAMPLES = 5


def make_app(desk: Desk, token: str | None = None) -> FastAPI:
    """The whole site as an ASGI app.

    Args:
        desk: The SAEs and the subject that it shows.
        token: Secret that every request must carry; None if it listens on loopback only.
    """
    # No built-in documentation pages: they load scripts from another host, which our policy forbids.
    app = FastAPI(
        title="Winnow explorer",
        description="Read what the latents of a sparse autoencoder mean, steer with them, watch them.",
        version="1",
        openapi_url="/api/openapi.json",
        docs_url=None,
        redoc_url=None,
        responses={
            400: {"description": "The request names what does not exist or does not fit; `error` says why"},
            503: {"description": "The model is busy; `Retry-After` says when to try again"},
        },
    )
    app.include_router(make_router(desk))

    @app.exception_handler(WinnowError)
    def refused(request: Request, error: WinnowError) -> Response:
        if isinstance(error, Busy):
            return refuse(request.scope, 503, str(error), {"Retry-After": str(_RETRY_SECONDS)})
        if isinstance(error, ConfigError):
            return refuse(request.scope, 400, str(error))
        # The text of any other error may contain addresses of storage: it goes to the log, not to visitors.
        log.error("%s", error)
        kind = "storage" if isinstance(error, StoreError) else "the index or the SAE"
        return refuse(request.scope, 500, f"Reading {kind} failed; the server's log says more")

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        if request.scope["path"].startswith(API):
            return await request_validation_exception_handler(request, error)
        return refuse(request.scope, 404, _NOWHERE)

    @app.exception_handler(HTTPException)
    def not_served(request: Request, error: HTTPException) -> Response:
        why = _NOWHERE if error.status_code == 404 else f"{error.detail}: {request.method}"
        return refuse(request.scope, error.status_code, why, error.headers)

    # Registered after the router, so that `/api/...` is never taken for a file's name.
    files = _load_files()

    @app.get("/", include_in_schema=False)
    def start() -> Response:
        # Of its own: with a default in `page`, a field `name` of the page's address would be the file's name.
        return page("index.html")

    @app.get(f"{EMBED}{{sae}}/{{latent}}", include_in_schema=False)
    def embedded(
        sae: Annotated[int, PathParameter(ge=0, le=255)],
        latent: Annotated[int, PathParameter(ge=0, lt=1 << 31)],
    ) -> Response:
        exhibit = desk.exhibit(sae)
        card = Card.of(exhibit, desk.latent(exhibit, latent), _EMBEDDED_EXAMPLES)
        address = f"/?page=feature&sae={sae}&latent={latent}"
        return Response(card.page(address), media_type=KINDS[".html"])

    @app.get("/{name}", include_in_schema=False)
    def page(name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        data, kind = files[name]
        return Response(data, media_type=kind)

    # The gate is outermost: it also guards errors, unknown paths and the API's description.
    app.add_middleware(Gate, token=token)
    return app


def _load_files() -> dict[str, tuple[bytes, str]]:
    """Bytes and media type of the page's files by name, read once: no request names a path."""
    return {
        path.name: (path.read_bytes(), KINDS[path.suffix])
        for path in sorted(_STATIC.iterdir())
        if path.suffix in KINDS
    }


def listen(host: str, port: int) -> socket.socket:
    """A bound socket for the server.

    Raises:
        ConfigError: The address is in use, or not one of this machine.
    """
    # Bound here rather than by uvicorn: a port in use is then an error in our words, and the number that
    # port 0 stands for is known before the address is printed.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    # Without it a restarted server waits a minute for connections of the old one to expire (TIME_WAIT).
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"address {host}:{port}",
            expected="one that is free",
            got=error.strerror,
            fix="Name another with --port; 0 takes a free one",
        ) from error
    return listener


def server(app: FastAPI) -> uvicorn.Server:
    """The server of the explorer; it stops at most 3 s after an interrupt, whatever requests still run."""
    # Without the timeout an abandoned stream keeps the process until its 200 tokens are generated.
    config = uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=3)
    return uvicorn.Server(config)


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Serve until interrupted."""
    server(app).run(sockets=[listener])
