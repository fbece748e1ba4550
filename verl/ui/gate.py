"""Who may ask the page: requests of this machine, with the token of the printed address, for the paths that the page needs."""

import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Callable[[], Awaitable[Any]], Send], Awaitable[None]]

# What gradio's page asks for. All else is refused: its routes that serve files or other hosts, its records, and its monitor.
_API = "run/predict|queue/join|queue/data|upload|upload_progress|heartbeat/[^/]+|startup-events|cancel|reset/?|theme.css|info/?"
_PATHS = re.compile(
    rf"/|/pages/[^/]+|/favicon\.ico|/manifest\.json|/(en|zh)/?|/(en|zh)/(config/?|theme\.css|(assets|static)/.+|gradio_api/({_API}))"
)
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; object-src 'none'; "
    "base-uri 'self'; frame-ancestors 'self'"
)
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]
REFUSED = "This page needs the token of the address that `verl ui` printed. Open that address.\n打开 verl ui 打印的地址，其中有令牌。\n"


class Gate:
    """Wraps an ASGI application.

    Args:
        app: the application.
        token: the secret of the printed address, `/?token=…`. A browser that opens it gets a cookie, and is led to the page.
        port: that of the page.
    """

    def __init__(self, app: App, token: str, port: int):
        self._app, self._token = app, token
        self._hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}
        self.cookie = f"verl-ui-{port}"

    async def __call__(self, scope: Scope, receive: Callable[[], Awaitable[Any]], send: Send) -> None:
        """Refuse a request, or hand it on."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":  # the page uses no websocket
            return await send({"type": "websocket.close", "code": 1008})
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        path, given = scope["path"], parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [""])[-1]
        if headers.get("host", "") not in self._hosts:  # another name that leads here is another site's
            return await _answer(send, 403, "found another host than this machine\n")
        if headers.get("origin", f"http://{headers['host']}") != f"http://{headers['host']}":
            return await _answer(send, 403, "found a request of another page\n")
        if path == "/" and self._is_token(given):
            cookie = f"{self.cookie}={self._token}; HttpOnly; SameSite=Lax; Path=/"
            language = "zh" if headers.get("accept-language", "").lower().startswith("zh") else "en"
            return await _answer(send, 303, "", [(b"location", f"/{language}/".encode()), (b"set-cookie", cookie.encode())])
        if not self._is_token(_cookie(headers.get("cookie", ""), self.cookie)):
            return await _answer(send, 403, REFUSED)
        if not _PATHS.fullmatch(path):
            return await _answer(send, 404, "the page has no such part\n")
        return await self._app(scope, receive, _with_headers(send, keep_policy=path.startswith("/pages/")))

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self._token.encode())


def _cookie(header: str, name: str) -> str:
    try:
        found = SimpleCookie(header).get(name)
    except CookieError:
        return ""
    return "" if found is None else found.value


def _with_headers(send: Send, *, keep_policy: bool) -> Send:
    """Add the headers to answers. `keep_policy`: the answer is a whole page with a policy of its own."""
    added = _HEADERS[1:] if keep_policy else _HEADERS

    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await send(message)

    return sending


async def _answer(send: Send, status: int, text: str, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    base = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-store"), *_HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": [*base, *(headers or [])]})
    await send({"type": "http.response.body", "body": text.encode()})
