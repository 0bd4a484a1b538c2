"""Who asks, and what they may: every route names the scope that it needs, and an application with a route that names none is not made."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute

from alignkit_serve.errors import ApiError
from alignkit_serve.store import Store, StoreError, keys
from alignkit_serve.store.keys import SCOPES, KeyRecord

PUBLIC = "public"
"""The scope of what anyone may see: whether the server is up, and pages without data."""

_FRESH_SECONDS = 2.0
"""How long a key is believed without asking the store again; a revoked one works no longer than that."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: the holder of a key, or, without authentication, anyone."""

    key: KeyRecord | None

    @property
    def name(self) -> str:
        """For the audit."""
        return f"key {self.key.public_id}" if self.key else "anyone"


class Keys:
    """The keys in force. ``required`` False: anyone may do anything, as on one's own machine."""

    def __init__(self, store: Store, *, required: bool) -> None:
        self._store = store
        self.required = required
        self._known: dict[str, tuple[float, KeyRecord]] = {}

    async def caller(self, request: Request, scope: str) -> Caller:
        """Who sent the request. Raises ``ApiError`` 401 without a key in force, 403 where the key does not allow it."""
        if not self.required:
            return Caller(None)
        kind, _, text = request.headers.get("authorization", "").partition(" ")
        key = await self._find(text.strip()) if kind.lower() == "bearer" else None
        if key is None:
            message = "there is no API key in force in the header Authorization: Bearer ...; `alignkit keys create` makes one"
            raise ApiError(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})
        if scope not in key.scopes:
            message = f"this key may do: {', '.join(key.scopes)}; here the scope {scope!r} is needed"
            raise ApiError(403, "insufficient_scope", message)
        return Caller(key)

    async def _find(self, text: str) -> KeyRecord | None:
        now = time.monotonic()
        fresh, key = self._known.get(text, (0.0, None))
        if key is None or now > fresh:
            try:
                key = await self._store.aread(lambda connection: keys.find(connection, text))
            except StoreError as error:
                raise ApiError(503, "store_unavailable", f"keys cannot be looked up: {error}", headers={"Retry-After": "5"}) from error
            self._known.pop(text, None)
            if key is None:
                return None  # not remembered: guesses must not fill the memory
            self._known[text] = (now + _FRESH_SECONDS, key)
            self._store.write(lambda connection: keys.touch(connection, key.id, datetime.now(UTC)))
        expired = key.expires_at is not None and key.expires_at <= datetime.now(UTC)
        return None if expired else key


def _needs(scope: str) -> Callable[[Request], Awaitable[Caller]]:
    """The dependency of a route that needs ``scope``."""
    assert scope in SCOPES

    async def caller(request: Request) -> Caller:
        found: Keys = request.app.state.keys
        return await found.caller(request, scope)

    _SCOPES[caller] = scope
    return caller


def anyone() -> None:
    """The dependency of a route that needs no scope, because it shows nothing that is anybody's."""


_SCOPES: dict[Callable[..., Any], str] = {anyone: PUBLIC}
"""The scope of each dependency that is one."""

Infer = Annotated[Caller, Depends(_needs("infer"))]
Admin = Annotated[Caller, Depends(_needs("admin"))]
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
