"""Exports over HTTP: the server writes them to its own folder, and tells what is in them."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from alignkit_serve.auth import Exporter
from alignkit_serve.dataset.filters import NAME, Filters, Form, Shape, Split
from alignkit_serve.errors import ApiError
from alignkit_serve.exporting import Wanted, obtain
from alignkit_serve.routes.serving import serving
from alignkit_serve.store import exports
from alignkit_serve.store.exports import Export

router = APIRouter(prefix="/v1/exports")

_DEFAULT = Filters()
Kind = Literal["thumb", "rating", "metric", "preference", "ranking", "correction", "demonstration", "flag"]
Moment = Annotated[str, StringConstraints(max_length=64)]
Share = Annotated[float, Field(gt=0, le=1)]


class ExportRequest(BaseModel):
    """``POST /v1/exports``: see ``Filters`` for what each field means."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, StringConstraints(pattern=f"^{NAME}$")]
    shape: Shape
    split: Split = "train"
    since: Moment | None = _DEFAULT.since
    until: Moment | None = _DEFAULT.until
    kinds: Annotated[list[Kind], Field(max_length=8)] = Field(default_factory=list)
    policies: Annotated[list[Annotated[str, StringConstraints(max_length=256)]], Field(max_length=64)] = Field(default_factory=list)
    form: Form = _DEFAULT.form
    of: Literal["judged", "all"] = _DEFAULT.of
    probation: Annotated[int, Field(ge=0)] = _DEFAULT.probation
    annotator_share: Share = _DEFAULT.annotator_share
    key_share: Share = _DEFAULT.key_share
    rating_gap: Annotated[int, Field(ge=0, le=6)] = _DEFAULT.rating_gap
    dead_band: Annotated[float, Field(ge=0, le=6)] = _DEFAULT.dead_band
    burst: Annotated[int, Field(ge=0)] = _DEFAULT.burst

    def wanted(self) -> Wanted:
        """As the rules take it. Raises ``SettingError``."""
        filters = {name: getattr(self, name) for name in Filters.names()}
        filters |= {"kinds": tuple(self.kinds), "policies": tuple(self.policies)}
        return Wanted(name=self.name, shape=self.shape, split=self.split, filters=Filters(**filters))


@router.post("")
async def make(request: Request, body: ExportRequest, caller: Exporter) -> dict[str, Any]:
    """Make an export; one that is there under its name is told of again."""
    folder: Path = request.app.state.exports
    made, _ = await asyncio.to_thread(obtain, serving(request).store, body.wanted(), folder)
    return _shown(made)


@router.get("")
async def listed(request: Request, caller: Exporter) -> dict[str, Any]:
    """Every export, the oldest first."""
    found = await serving(request).store.aread(exports.listed)
    return {"object": "list", "data": [_shown(each) for each in found]}


@router.get("/{id}")
async def retrieve(request: Request, id: str, caller: Exporter) -> dict[str, Any]:
    """One export."""
    found = await serving(request).store.aread(lambda connection: exports.get(connection, id))
    if found is None:
        raise ApiError(404, "not_found", f"there is no export {id!r}", param="id")
    return _shown(found)


def _shown(export: Export) -> dict[str, Any]:
    moments = {"created_at": export.created_at.isoformat(), "tainted_at": export.tainted_at and export.tainted_at.isoformat()}
    return {"object": "export", **asdict(export), **moments}
