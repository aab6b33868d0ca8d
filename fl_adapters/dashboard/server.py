"""The web server of the dashboard: its application, and the process's own server on the loopback."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from importlib import resources

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from fl_adapters.dashboard.access import TOKEN, Access
from fl_adapters.dashboard.page import NAVIGATION, error_page, is_below
from fl_adapters.dashboard.section import Section
from fl_runtime.errors import ConfigError, FederationError

LOOPBACK = "127.0.0.1"
_LOOK_S = 0.2  # between two looks at whether a page has changed
_BEAT_LOOKS = 50  # looks after which a line is sent that says nothing, by which a browser that is gone is found
_STATIC = {
    "style.css": ("fl_adapters.environments.report", "text/css"),
    "dashboard.css": ("fl_adapters.dashboard", "text/css"),
    "live.js": ("fl_adapters.dashboard", "text/javascript"),
}


class Dashboard:
    """The dashboard's server. It listens on the loopback from the start, and answers while `serve` runs.

    Args:
        sections: The groups of pages; the first one opens first.
        port: Port to listen on; 0 for a free one.

    Raises:
        ConfigError: The port is taken.

    Attributes:
        address: Address to open in a browser; with the token, which nobody else should see.
    """

    def __init__(self, sections: Sequence[Section], port: int = 0) -> None:
        self._sections = sections
        self._socket = _listening(port)
        port = self._socket.getsockname()[1]
        token = secrets.token_urlsafe(24)
        self.address = f"http://{LOOPBACK}:{port}/?{TOKEN}={token}"
        app = make_app(sections, token, port, lambda: self._server.should_exit)
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1, lifespan="on")
        self._server = uvicorn.Server(config)

    def serve(self, started: Callable[[], object] = lambda: None) -> None:
        """Answer requests until `stop` is called, or the process is interrupted.

        Args:
            started: Called once, before the first request is answered.
        """
        with suppress(KeyboardInterrupt):  # the usual end, which the server raises once it has closed everything
            started()
            self._server.run([self._socket])

    def stop(self) -> None:
        """Let `serve` return. May be called by any thread."""
        self._server.should_exit = True


def make_app(sections: Sequence[Section], token: str, port: int, is_ending: Callable[[], bool]) -> Starlette:
    """Make the application of a dashboard.

    Args:
        sections: The groups of pages. They are closed when the application ends.
        token: What a reader must know.
        port: Port at which it is served.
        is_ending: Whether the server is about to end, so that streams to browsers have to.

    Returns:
        The ASGI application.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        for section in sections:
            section.close()

    async def changes(request: Request) -> Response:
        page = request.query_params.get("page", "")
        section = next((s for s in sections if is_below(s.path, page)), None)
        return StreamingResponse(_changes(section, page, is_ending), media_type="text/event-stream")

    routes = [
        Route("/", lambda request: RedirectResponse(sections[0].path, 303)),
        Route("/changes", changes),
        Route("/static/{name}", _static),
        *(route for section in sections for route in section.routes()),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Access, token=token, port=port)],
        exception_handlers={FederationError: _refused, HTTPException: _missing},
        lifespan=lifespan,
    )
    setattr(app.state, NAVIGATION, sections)
    return app


async def _changes(section: Section | None, page: str, is_ending: Callable[[], bool]) -> AsyncIterator[str]:
    """Yield a server-sent event at the start, and whenever a page would look different, until the server ends."""
    shown: str | None = None
    looks = 0
    while not is_ending():
        version = await run_in_threadpool(section.version, page) if section else ""
        if version != shown:
            shown = version
            yield "data: new\n\n"
        elif looks % _BEAT_LOOKS == 0:
            yield ": still here\n\n"
        looks += 1
        await asyncio.sleep(_LOOK_S)


def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _STATIC:
        raise HTTPException(404)
    package, kind = _STATIC[name]
    content = resources.files(package).joinpath(name).read_bytes()
    return Response(content, media_type=kind, headers={"cache-control": "no-cache"})


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, FederationError)
    return error_page(request, error)


def _missing(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = "there is no such page" if error.status_code == 404 else f"the request is not allowed: {error.detail}"
    fix = "go back, or choose a page above"
    return error_page(request, ConfigError(what, where=request.url.path[:200], fix=fix), error.status_code)


def _listening(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((LOOPBACK, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"the dashboard cannot listen on port {port}: {error.strerror or error}",
            fix="choose another one with --port, or leave the option out for a free one",
        ) from error
    return listener
