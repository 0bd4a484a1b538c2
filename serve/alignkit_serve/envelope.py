"""Around every request: an id, a bound on its size, headers that protect browsers, a line in the log without anybody's words.

Plain ASGI: Starlette's ``@app.middleware`` would hide from the routes that a client has gone.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from functools import cache
from typing import Any

from prometheus_client import Counter, Histogram
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from alignkit_serve.errors import ApiError
from alignkit_serve.store import new_id

_LOG = logging.getLogger("alignkit.access")
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = (
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
"""What an answer has, where its route does not say otherwise."""


class Envelope:
    """``requests`` counts by method, route and status; ``seconds`` measures until the last byte.

    ``body_bytes`` is the most that a body may have, but for the paths that are ``larger``.
    """

    def __init__(self, app: ASGIApp, *, body_bytes: int, larger: Mapping[str, int], requests: Counter, seconds: Histogram) -> None:
        self._app, self._body_bytes, self._larger = app, body_bytes, larger
        # Methods, routes and statuses are few, and looking one up takes the library longer than counting.
        self._requests, self._seconds = cache(requests.labels), cache(seconds.labels)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status, read = time.monotonic(), 500, 0
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else new_id("req-")
        scope.setdefault("state", {})["request_id"] = request_id
        declared = headers.get("content-length", "0")
        most = self._larger.get(scope["path"], self._body_bytes)
        too_long = declared.isdigit() and int(declared) > most

        async def receiving() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if too_long or read > most:
                raise ApiError(413, "request_too_large", f"the request's body is longer than {most} bytes")
            return message

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = {name for name, _ in message["headers"]}
                added = [header for header in _HEADERS if header[0] not in own]
                message["headers"] = [*message["headers"], *added, (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receiving, sending)
        finally:
            taken = time.monotonic() - begun
            route = _route(scope)
            self._requests(scope["method"] if scope["method"] in _METHODS else "other", route, str(status)).inc()
            self._seconds(route).observe(taken)
            _LOG.info("%s %s %s %s %d bytes %.3f s", request_id, scope["method"], route, status, read, taken)


_METHODS = frozenset({"GET", "POST", "PATCH", "PUT", "DELETE", "HEAD", "OPTIONS"})


def _route(scope: Scope) -> str:
    """The route's own path, with names for what varies: neither ids nor query strings are anybody's business."""
    route: Any = scope.get("route")
    return getattr(route, "path", "unknown")
