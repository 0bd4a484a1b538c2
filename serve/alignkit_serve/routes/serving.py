"""What every route starts from."""

from __future__ import annotations

from fastapi import Request

from alignkit_serve.errors import unavailable
from alignkit_serve.service import Service


def serving(request: Request) -> Service:
    """The running service. Raises ``ApiError`` 503 before it is there."""
    found: Service | None = request.app.state.service
    if found is None:
        raise unavailable("loading", "the server is starting", 5)
    return found
