"""Routes that answer with pages: nothing is changed for another site's page, and mistakes are told to people in a page too."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import parse_qsl

from fastapi import Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from alignkit_serve.browsers import check_origin, wants_page
from alignkit_serve.errors import ApiError
from alignkit_serve.page import templates
from alignkit_serve.store import StoreError, StoreUnavailable

_FIELDS = 1000


class PageRoute(APIRoute):
    """A route of pages. What it raises becomes a page for those who want one, and is told as everywhere to the rest."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own, within."""
        handler = super().get_route_handler()

        async def page(request: Request) -> Response:
            try:
                check_origin(request)
                return await handler(request)
            except (HTTPException, StoreError) as error:
                if not wants_page(request):
                    raise
                return _told(error)

        return page


def answer(template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """A page made for one reader."""
    return HTMLResponse(templates.render(template, **values), status, templates.headers())


def see(path: str) -> RedirectResponse:
    """Go on there: what was sent is done, and is not sent again with the page."""
    return RedirectResponse(path, 303, templates.headers())


async def form(request: Request) -> list[tuple[str, str]]:
    """The fields of a form as a browser sends it. Raises ``ApiError`` 400."""
    try:
        return parse_qsl((await request.body()).decode(), keep_blank_values=True, max_num_fields=_FIELDS)
    except ValueError as error:
        raise ApiError(400, "invalid_request", f"the form cannot be read: {error}") from error


def _told(error: HTTPException | StoreError) -> Response:
    if isinstance(error, StoreError):
        error = ApiError(503 if isinstance(error, StoreUnavailable) else 409, "refused", str(error))
    told = dict(error.headers or {})
    if "Location" in told:
        return see(told["Location"])
    title = _TITLES.get(error.status_code, "That did not work")
    page = answer("problem.html", error.status_code, title=title, message=error.detail)
    page.headers.update(told)
    return page


_TITLES = {403: "This is not allowed", 404: "There is nothing here", 409: "This was not stored", 503: "The server is busy"}
