"""Who may read the dashboard: whoever has its token, from a page that came from the dashboard itself."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN = "token"
"""Name of the query's field with the token."""

HEADERS: Mapping[str, str] = {
    # nothing from elsewhere is loaded, nothing in a page runs but the dashboard's own file, and no other page frames it
    "content-security-policy": "default-src 'none'; style-src 'self'; style-src-attr 'unsafe-inline'; "
    "img-src data:; script-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # with no-referrer, browsers name the origin of forms "null"
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
_READS = ("GET", "HEAD")


class Access:
    """ASGI middleware that lets in requests with the token alone, and none that another web page has caused.

    The address that the command prints holds the token. The first request trades it for a cookie that scripts cannot
    read and that no other site's page can send. A name in `Host` that is not the loopback's is refused, since another
    site could have made its own name mean this machine (DNS rebinding).

    Args:
        app: What serves the requests that are let in.
        token: The token.
        port: Port of the dashboard. Cookies do not tell ports apart, so the name of this one does.
    """

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self._app, self._token, self._cookie = app, token, f"fl-adapters-dashboard-{port}"
        self._hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        answer = self._refusal(scope) or self._welcome(scope)
        await (answer or self._app)(scope, receive, send_safely)

    def _refusal(self, scope: Scope) -> Response | None:
        """Why a request is refused before anybody looks at its token; None if it is not."""
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if host not in self._hosts:
            return _refused("The dashboard answers to http://127.0.0.1 alone. Open the address that it has printed.")
        if scope["method"] not in _READS and origin != f"http://{host}":
            return _refused("The dashboard takes no request that another page has made. Open its own address.")
        return None

    def _welcome(self, scope: Scope) -> Response | None:
        """Trade the token for the cookie, or refuse a request with neither; None for one that has the cookie."""
        fields = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if any(name == TOKEN and self._is_token(value) for name, value in fields) and scope["method"] in _READS:
            rest = urlencode([(name, value) for name, value in fields if name != TOKEN])
            there = RedirectResponse("/" + scope["path"].lstrip("/") + (f"?{rest}" if rest else ""), 303)
            there.set_cookie(self._cookie, self._token, httponly=True, samesite="strict")
            return there
        if self._is_token(_cookies(scope).get(self._cookie, "")):
            return None
        return _refused("Open the address with the token that `fl-adapters dashboard` has printed on its terminal.")

    def _is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode("utf-8", "replace"), self._token.encode())


def _cookies(scope: Scope) -> dict[str, str]:
    try:
        return {name: cookie.value for name, cookie in SimpleCookie(Headers(scope=scope).get("cookie", "")).items()}
    except CookieError:
        return {}


def _refused(text: str) -> Response:
    return PlainTextResponse(text + "\n", 403)
