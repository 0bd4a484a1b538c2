"""Policies and the audit, for those who run the server."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from alignkit_serve.auth import Admin
from alignkit_serve.routes.serving import serving
from alignkit_serve.schemas import StagePolicy
from alignkit_serve.store import audit, policies
from alignkit_serve.store.policies import PolicyVersion

router = APIRouter(prefix="/v1/admin")


@router.get("/policies")
async def listed(request: Request, caller: Admin) -> dict[str, Any]:
    """Every version there ever was, with its state."""
    versions = await serving(request).store.aread(policies.listed)
    return {"object": "list", "data": [_version(version) for version in versions]}


@router.post("/policies")
async def stage(request: Request, body: StagePolicy, caller: Admin) -> dict[str, Any]:
    """Load a policy and put it through its gates; with ``promote`` it answers from then on."""
    roster = serving(request).roster
    version = await roster.stage(Path(body.path), caller.name)
    return _version(await roster.promote(version.id, caller.name) if body.promote else version)


@router.post("/policies/{id}/promote")
async def promote(request: Request, id: str, caller: Admin) -> dict[str, Any]:
    """Let a warm version answer from now on."""
    return _version(await serving(request).roster.promote(id, caller.name))


@router.post("/rollback")
async def rollback(request: Request, caller: Admin) -> dict[str, Any]:
    """Put the version that was live before back in its place."""
    return _version(await serving(request).roster.rollback(caller.name))


@router.get("/audit")
async def audited(request: Request, caller: Admin, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> dict[str, Any]:
    """Who did what, the newest first."""
    entries = await serving(request).store.aread(lambda connection: audit.entries(connection, limit))
    return {"object": "list", "data": [{**asdict(entry), "at": entry.at.isoformat()} for entry in entries]}


def _version(version: PolicyVersion) -> dict[str, Any]:
    return {**asdict(version), "object": "policy_version", "created_at": int(version.created_at.timestamp())}
