"""The application: routes, each with the scope that it needs, and errors in OpenAI's form wherever they come from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.exceptions import HTTPException

import alignkit
from alignkit.api import AlignkitError
from alignkit_serve.auth import Keys, scopes_of
from alignkit_serve.desk import Desk
from alignkit_serve.envelope import Envelope
from alignkit_serve.errors import ApiError, problems, unavailable
from alignkit_serve.routes import (
    admin,
    agreement,
    completions,
    exports,
    feedback,
    health,
    label,
    label_admin,
    lineage,
    models,
    pages,
    rounds,
    stored,
    tasks,
)
from alignkit_serve.service import Service
from alignkit_serve.store import StoreError, StoreUnavailable

_LOG = logging.getLogger(__name__)

ROUTERS = (
    feedback.router,
    completions.router,
    stored.router,
    models.router,
    admin.router,
    health.router,
    pages.router,
    tasks.router,
    agreement.router,
    label.router,
    label_admin.router,
    exports.router,
    rounds.router,
    lineage.router,
)
"""Every route that there is."""


def create_app(service: Service, keys: Keys, *, exports_to: Path) -> FastAPI:
    """The application around a service, which writes exports to a folder.

    Raises ``AssertionError`` for a route without a scope: it would be open to anyone.
    """
    app = FastAPI(title="alignkit", version=alignkit.__version__, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.service, app.state.keys, app.state.exports = service, keys, exports_to
    app.state.figures = figures = CollectorRegistry()
    app.state.desk = Desk(service.scribe, figures, per_target_rpm=service.limits.feedback_per_target_rpm)
    scopes_of(ROUTERS)
    for router in ROUTERS:
        app.include_router(router)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(AlignkitError, _refused)
    app.add_exception_handler(Exception, _bug)
    app.add_middleware(
        cast(Any, Envelope),
        body_bytes=service.limits.body_bytes,
        larger={"/v1/feedback:batch": service.limits.batch_bytes},
        requests=Counter("alignkit_requests", "requests by method, route and status", ["method", "route", "status"], registry=figures),
        seconds=Histogram("alignkit_request_seconds", "until the last byte was sent", ["route"], registry=figures),
    )
    return app


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, ApiError):
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        error = ApiError(error.status_code, code, f"{request.method} {request.url.path}: {error.detail}", headers=error.headers)
    return JSONResponse(error.body(), status_code=error.status_code, headers=error.headers)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """Every field that is wrong, in words; ``param`` is the first."""
    assert isinstance(error, RequestValidationError)
    message, param = problems(error.errors())
    return await _http_error(request, ApiError(400, "invalid_request", message, param=param))


async def _refused(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, StoreUnavailable):
        return await _http_error(request, unavailable("store_unavailable", str(error), 5))
    code = "conflict" if isinstance(error, StoreError) else "refused"
    status = 409 if isinstance(error, StoreError) else 400
    return await _http_error(request, ApiError(status, code, str(error), headers={"x-should-retry": "false"}))


async def _bug(request: Request, error: Exception) -> JSONResponse:
    _LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return await _http_error(request, ApiError(500, "internal_error", "the server made a mistake; its log has the details"))
