"""Where feedback went, what a policy is made of, and how all of one person is erased. For admins alone: it names others."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from alignkit_serve.auth import Admin
from alignkit_serve.errors import ApiError
from alignkit_serve.provenance import erasure_json, feedback_lineage_json, policy_lineage_json
from alignkit_serve.routes.serving import serving
from alignkit_serve.store import erasure, lineage
from alignkit_serve.store.erasure import UnknownSubject

router = APIRouter(prefix="/v1")


@router.get("/lineage/feedback/{id}")
async def of_feedback(request: Request, id: str, caller: Admin) -> dict[str, Any]:
    """The exports, rounds and policies that a piece of feedback is in."""
    found = await serving(request).store.aread(lambda connection: lineage.of_feedback(connection, id))
    if found is None:
        raise ApiError(404, "not_found", f"there is no feedback {id!r}", param="id")
    return feedback_lineage_json(found)


@router.get("/lineage/policy/{id:path}")
async def of_policy(request: Request, id: str, caller: Admin) -> dict[str, Any]:
    """What a policy, by id or name, came from and learnt from."""
    found = await serving(request).store.aread(lambda connection: lineage.of_policy(connection, id))
    if found is None:
        raise ApiError(404, "not_found", f"there is no policy {id!r}", param="id")
    return policy_lineage_json(found)


@router.delete("/subjects/{id:path}")
async def erase(request: Request, id: str, caller: Admin) -> dict[str, Any]:
    """Erase what an end user or an annotator said; what went into files, and which policies saw it, is told."""
    try:
        return erasure_json(await serving(request).store.awrite(lambda connection: erasure.erase(connection, id, caller.name)))
    except UnknownSubject as error:
        raise ApiError(404, "not_found", str(error), param="id") from error
