"""What those who run a labelling look at: a page of figures, and tables for a spreadsheet."""

from __future__ import annotations

from typing import Literal, get_args

from fastapi import APIRouter, Request, Response

from alignkit_serve import label_tables
from alignkit_serve.auth import Overseer
from alignkit_serve.page.templates import headers
from alignkit_serve.routes.agreement import DAYS, figures
from alignkit_serve.routes.html import PageRoute, answer
from alignkit_serve.routes.serving import serving
from alignkit_serve.store import pool

router = APIRouter(route_class=PageRoute, include_in_schema=False)

Table = Literal["annotators", "tasks", "pairs"]

_SHOWN = 200
"""Annotators on the page: those who ranked most."""


@router.get("/label/admin")
async def page(request: Request, caller: Overseer) -> Response:
    """How far the labelling is, and how far those who judge agree."""
    found, progress = await figures(serving(request).store)
    most = sorted(found.annotators, key=lambda each: -each.rankings)[:_SHOWN]
    return answer("admin.html", found=found, progress=progress, annotators=most, days=DAYS, tables=get_args(Table))


@router.get("/label/admin.csv")
async def download(request: Request, caller: Overseer, table: Table) -> Response:
    """One of the tables."""
    store = serving(request).store
    if table == "tasks":
        rows = await store.aread(lambda connection: [label_tables.task(each) for each in pool.every(connection)])
    else:
        found, _ = await figures(store)
        rows = label_tables.annotators(found) if table == "annotators" else label_tables.pairs(found)
    disposition = {"Content-Disposition": f'attachment; filename="{table}.csv"'}
    return Response(label_tables.csv_text(table, rows), media_type="text/csv; charset=utf-8", headers=headers() | disposition)
