"""What every route starts from."""

from __future__ import annotations

from fastapi import Request

from alignkit_serve.service import Service


def serving(request: Request) -> Service:
    """The running service."""
    service: Service = request.app.state.service
    return service
