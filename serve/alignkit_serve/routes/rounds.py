"""Training rounds: recorded and, where the gate says so, promoted in the same transaction, so that neither is there without the other."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from sqlalchemy import Connection

from alignkit_serve.auth import Admin
from alignkit_serve.errors import ApiError
from alignkit_serve.provenance import round_json
from alignkit_serve.round_requests import NewRound
from alignkit_serve.routes.serving import serving
from alignkit_serve.store import audit, new_id, rounds
from alignkit_serve.store.rounds import Round

router = APIRouter(prefix="/v1/rounds")


@router.post("", status_code=201)
async def record(request: Request, body: NewRound, caller: Admin) -> JSONResponse:
    """Record a round, and with ``promote`` let its policy answer from now on; without, let go of it. Sent again, nothing more happens."""
    service, made = serving(request), body.round(new_id("rnd-"))

    def write(connection: Connection) -> tuple[Round, bool]:
        found, news = rounds.add(connection, made)
        if news:
            detail = {"name": found.name, "parent": found.parent_policy_id, "promoted": found.promoted, "exports": list(found.exports)}
            audit.record(connection, caller.name, "round", found.id, {"child": found.child_policy_id, **detail})
        return found, news

    before = await service.store.aread(lambda connection: rounds.known(connection, made.name, made.child_policy_id))
    # One that was promoted may have been rolled back since; a request that comes twice does not undo that.
    if body.promote and not (before and before.promoted):
        if made.child_policy_id not in {one.version.id for one in service.roster.loaded()}:
            message = f"policy {made.child_policy_id!r} is not loaded, and cannot be promoted; stage it first: POST /v1/admin/policies"
            raise ApiError(409, "conflict", message, param="child_policy_id", headers={"x-should-retry": "false"})
        _, (found, news) = await service.roster.promote_with(made.child_policy_id, caller.name, write)
    else:
        found, news = await service.store.awrite(write)
        if news:
            service.roster.dismiss(found.child_policy_id)
    return JSONResponse(round_json(found), 201 if news else 200)


@router.get("")
async def listed(request: Request, caller: Admin) -> dict[str, Any]:
    """Every round, the oldest first."""
    return {"object": "list", "data": [round_json(each) for each in await serving(request).store.aread(rounds.listed)]}


@router.get("/{id}")
async def retrieve(request: Request, id: str, caller: Admin) -> dict[str, Any]:
    """One of them."""
    found = await serving(request).store.aread(lambda connection: rounds.get(connection, id))
    if found is None:
        raise ApiError(404, "not_found", f"there is no round {id!r}", param="id")
    return round_json(found)
