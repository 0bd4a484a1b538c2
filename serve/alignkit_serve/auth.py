"""Who asks, and what they may: every route names the scope that it needs, and an application with a route that names none is not made."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.routing import APIRoute
from sqlalchemy import Connection
from starlette.responses import Response
from starlette.routing import BaseRoute

from alignkit_serve import browsers, passes
from alignkit_serve.errors import ApiError
from alignkit_serve.passes import Pass
from alignkit_serve.store import Store, StoreError, keys, secrets, sessions
from alignkit_serve.store.annotators import Author
from alignkit_serve.store.keys import SCOPES, KeyRecord

PUBLIC = "public"
"""The scope of what anyone may see: whether the server is up, and pages without data."""

_FRESH_SECONDS = 2.0
"""How long a key is believed without asking the store again; a revoked one works no longer than that."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: the holder of a key, or of a token that one gave away, or, without authentication, anyone."""

    key: KeyRecord | None
    token: Pass | None = None

    @property
    def name(self) -> str:
        """For the audit."""
        return f"key {self.key.public_id}" if self.key else "anyone"

    @property
    def author(self) -> Author:
        """Who it is that judges: never what a request says of itself."""
        return Author(self.key.id if self.key else None, self.token.subject if self.token else None)

    @property
    def within(self) -> str | None:
        """The one inference that may be spoken of; None: any."""
        return self.token.inference_id if self.token else None

    @property
    def sees_all(self) -> bool:
        """Whether what others said may be seen and changed."""
        return self.token is None and (self.key is None or "admin" in self.key.scopes)


class Keys:
    """The keys in force. ``required`` False: anyone may do anything, as on one's own machine."""

    def __init__(self, store: Store, *, required: bool) -> None:
        self._store = store
        self.required = required
        self._known: dict[str, tuple[float, KeyRecord]] = {}
        self._secrets: dict[str, bytes] = {}

    async def caller(self, request: Request, scopes: Sequence[str], *, tokens: bool) -> Caller:
        """Who sent the request; one of the ``scopes`` is enough, and ``tokens`` may do here what they can.

        Raises ``ApiError`` 401 without a key or token in force, 403 where the key does not allow it.
        """
        kind, _, text = request.headers.get("authorization", "").partition(" ")
        text = text.strip() if kind.lower() == "bearer" else ""
        if tokens and text.startswith(passes.PREFIX):
            return await self._bearer(text)
        if not self.required:
            return Caller(None)
        key = await self._find(text) if text else None
        if key is None:
            message = "there is no API key in force in the header Authorization: Bearer ...; `alignkit keys create` makes one"
            raise ApiError(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})
        if not any(scope in key.scopes for scope in scopes):
            raise _barred(key, scopes)
        return Caller(key)

    async def visitor(self, request: Request, scopes: Sequence[str]) -> Caller:
        """Who sits at the browser that sent the request: whoever signed in there, or else ``caller``.

        Raises ``ApiError`` as that does, and 303 to where one signs in for those who want a page.
        """
        key = await self._of_session(request) if self.required and "authorization" not in request.headers else None
        if key is None:
            try:
                return await self.caller(request, scopes, tokens=False)
            except ApiError as error:
                if error.status_code != 401 or not browsers.wants_page(request):
                    raise
                raise ApiError(303, "sign_in", "sign in first", headers={"Location": browsers.SIGN_IN}) from error
        if not any(scope in key.scopes for scope in scopes):
            raise _barred(key, scopes)
        return Caller(key)

    async def sign_in(self, request: Request, response: Response, text: str, scopes: Sequence[str]) -> KeyRecord:
        """Begin a session of the key with that text, and put it into the response. Raises ``ApiError`` 400, 401 and 403."""
        key = await self._find(text)
        if key is None:
            raise ApiError(401, "invalid_api_key", "there is no such key, or it is not in force")
        if not any(scope in key.scopes for scope in scopes):
            raise _barred(key, scopes)
        session = await self._store.awrite(lambda connection: sessions.begin(connection, key.id, datetime.now(UTC)))
        browsers.remember(request, response, session, await self._signing(browsers.SECRET))
        return key

    async def sign_out(self, request: Request, response: Response) -> None:
        """End the session of a browser, if it has one."""
        id = browsers.session_id(request, await self._signing(browsers.SECRET))
        if id is not None:
            await self._store.awrite(lambda connection: sessions.end(connection, id))
        browsers.forget(request, response)

    async def token(self, caller: Caller, inference_id: str, subject: str, seconds: int) -> tuple[str, int]:
        """A token for the answers of one inference, and when it is over (seconds since 1970)."""
        expires = int(time.time()) + seconds
        return Pass(inference_id, subject, caller.key.id if caller.key else None, expires).text(await self._signing(passes.SECRET)), expires

    async def _bearer(self, text: str) -> Caller:
        token = passes.read(text, await self._signing(passes.SECRET))
        key = await self._of_id(token.api_key_id) if token and token.api_key_id else None
        if token is None or (key is None and (token.api_key_id is not None or self.required)):
            message = "this feedback token is not in force; ask the application that gave it for another"
            raise ApiError(401, "invalid_token", message, headers={"WWW-Authenticate": "Bearer"})
        return Caller(key, token)

    async def _of_session(self, request: Request) -> KeyRecord | None:
        id = browsers.session_id(request, await self._signing(browsers.SECRET))
        if id is None:
            return None
        session = await self._store.aread(lambda connection: sessions.find(connection, id, datetime.now(UTC)))
        return await self._of_id(session.api_key_id) if session else None

    async def _signing(self, name: str) -> bytes:
        if name not in self._secrets:
            self._secrets[name] = await self._store.awrite(lambda connection: secrets.secret(connection, name))
        return self._secrets[name]

    async def _of_id(self, id: str) -> KeyRecord | None:
        return await self._remembered(id, lambda connection: keys.in_force(connection, id))

    async def _find(self, text: str) -> KeyRecord | None:
        return await self._remembered(text, lambda connection: keys.find(connection, text))

    async def _remembered(self, name: str, find: Callable[[Connection], KeyRecord | None]) -> KeyRecord | None:
        now = time.monotonic()
        fresh, key = self._known.get(name, (0.0, None))
        if key is None or now > fresh:
            try:
                key = await self._store.aread(find)
            except StoreError as error:
                raise ApiError(503, "store_unavailable", f"keys cannot be looked up: {error}", headers={"Retry-After": "5"}) from error
            self._known.pop(name, None)
            if key is None:
                return None  # not remembered: guesses must not fill the memory
            used = key
            self._known[name] = (now + _FRESH_SECONDS, used)
            self._store.write(lambda connection: keys.touch(connection, used.id, datetime.now(UTC)))
        expired = key.expires_at is not None and key.expires_at <= datetime.now(UTC)
        return None if expired else key


def _needs(*scopes: str, tokens: bool = False) -> Callable[[Request], Awaitable[Caller]]:
    """The dependency of a route that needs one of ``scopes``, of which the first is the one that a route is listed with."""
    assert set(scopes) <= set(SCOPES)

    async def caller(request: Request) -> Caller:
        found: Keys = request.app.state.keys
        return await found.caller(request, scopes, tokens=tokens)

    _SCOPES[caller] = scopes[0]
    return caller


def _visits(*scopes: str) -> Callable[[Request], Awaitable[Caller]]:
    """The dependency of a page for those who signed in with a key of one of ``scopes``. Its routes are of the class ``PageRoute``."""
    assert set(scopes) <= set(SCOPES)

    async def visitor(request: Request) -> Caller:
        found: Keys = request.app.state.keys
        return await found.visitor(request, scopes)

    _SCOPES[visitor] = scopes[0]
    return visitor


def _barred(key: KeyRecord, scopes: Sequence[str]) -> ApiError:
    message = f"this key may do: {', '.join(key.scopes)}; here the scope {' or '.join(map(repr, scopes))} is needed"
    return ApiError(403, "insufficient_scope", message)


def anyone() -> None:
    """The dependency of a route that needs no scope, because it shows nothing that is anybody's."""


_SCOPES: dict[Callable[..., Any], str] = {anyone: PUBLIC}
"""The scope of each dependency that is one."""

Infer = Annotated[Caller, Depends(_needs("infer"))]
Judge = Annotated[Caller, Depends(_needs("feedback:write", tokens=True))]
Reader = Annotated[Caller, Depends(_needs("feedback:read", tokens=True))]
Giver = Annotated[Caller, Depends(_needs("infer", "feedback:write"))]
Exporter = Annotated[Caller, Depends(_needs("export"))]
Admin = Annotated[Caller, Depends(_needs("admin"))]
Labeller = Annotated[Caller, Depends(_visits("label"))]
Overseer = Annotated[Caller, Depends(_visits("admin"))]
Anyone = Annotated[None, Depends(anyone)]
"""What a route's signature names: who calls, with the scope that they need."""


def scopes_of(routers: Sequence[APIRouter]) -> dict[str, str]:
    """Each route's scope, as ``"GET /v1/models"``. Raises ``AssertionError`` for one that names none: it would be open to anyone."""
    found = {}
    for route in (route for router in routers for route in router.routes):
        scope = _scope(route)
        assert isinstance(route, APIRoute)
        assert scope, f"{route} names no scope"
        found.update({f"{method} {route.path}": scope for method in sorted(route.methods or ())})
    return found


def _scope(route: BaseRoute) -> str | None:
    if not isinstance(route, APIRoute):
        return None
    return next((_SCOPES[each.call] for each in route.dependant.dependencies if each.call in _SCOPES), None)
