"""The chat page: files of the package, the same for everyone."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from alignkit_serve.auth import Anyone
from alignkit_serve.errors import ApiError
from alignkit_serve.page import PAGES, page

router = APIRouter()


@router.get("/", include_in_schema=False)
async def chat(request: Request, allowed: Anyone) -> Response:
    """A chat in the browser, on the same API as everyone's."""
    return _file(request, "chat.html")


@router.get("/assets/{name}", include_in_schema=False)
async def asset(request: Request, name: str, allowed: Anyone) -> Response:
    """What the page is made of."""
    if name not in PAGES:
        raise ApiError(404, "not_found", f"there is no {name!r} here")
    return _file(request, name)


def _file(request: Request, name: str) -> Response:
    found = page(name)
    if request.headers.get("if-none-match") == found.etag:
        return Response(status_code=304, headers={"ETag": found.etag})
    return Response(found.content, media_type=found.media_type, headers={"ETag": found.etag, "Cache-Control": "no-cache"})
