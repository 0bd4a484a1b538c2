"""How far those who judge agree, and how far the labelling is."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

from fastapi import APIRouter, Request
from sqlalchemy import Connection

from alignkit_serve.agreement import Figure
from alignkit_serve.auth import Admin
from alignkit_serve.consensus import Annotator, Consensus, consensus
from alignkit_serve.routes.serving import serving
from alignkit_serve.store import Store, verdicts
from alignkit_serve.store.verdicts import Progress

router = APIRouter()

DAYS = 14
"""How far back the progress of single days is told."""


@router.get("/v1/label/agreement")
async def agreement(request: Request, caller: Admin) -> dict[str, Any]:
    """All of it but the pairs; a figure that rests on too little is null."""
    found, progress = await figures(serving(request).store)
    return {
        "object": "label.agreement",
        "agreement": _figure(found.agreement),
        "alpha_pairs": _figure(found.alpha_pairs),
        "alpha_ratings": _figure(found.alpha_ratings),
        "tau": _figure(found.tau),
        "position_bias": [asdict(page) for page in found.bias],
        "annotators": [_annotator(each) for each in found.annotators],
        "progress": asdict(progress),
    }


async def figures(store: Store) -> tuple[Consensus, Progress]:
    """Of all that is in the store now."""

    def read(connection: Connection) -> tuple[list[verdicts.Verdict], dict[str, verdicts.Tiers], Progress]:
        progress = verdicts.progress(connection, since=datetime.now(UTC) - timedelta(days=DAYS))
        return list(verdicts.verdicts(connection)), verdicts.gold(connection), progress

    every, gold, progress = await store.aread(read)
    return await asyncio.to_thread(consensus, every, gold), progress


def _figure(figure: Figure | None) -> dict[str, Any] | None:
    return asdict(figure) if figure else None


def _annotator(annotator: Annotator) -> dict[str, Any]:
    shares = {"agreement": annotator.agreement, "gold": annotator.gold, "ties": annotator.ties}
    return {**asdict(annotator), **{name: {**asdict(share), "value": share.value} for name, share in shares.items()}}
