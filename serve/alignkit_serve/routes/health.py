"""Whether the server is up, whether it takes work, and its figures."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from alignkit_serve.auth import Admin, Anyone
from alignkit_serve.errors import unavailable
from alignkit_serve.routes.serving import serving

router = APIRouter()


@router.get("/health")
async def health(allowed: Anyone) -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request, allowed: Anyone) -> dict[str, Any]:
    """It takes work: 503 from the moment it was asked to stop, and when the live policy's engine cannot go on."""
    service = serving(request)
    if service.admission.draining:
        raise unavailable("draining", "the server is about to stop", 5)
    if problem := service.roster.live().engine.problem():
        raise unavailable("engine_unavailable", problem, 60)
    return {"status": "ready"}


@router.get("/metrics")
async def metrics(request: Request, caller: Admin) -> PlainTextResponse:
    """Prometheus' text format."""
    service, now = serving(request), CollectorRegistry()
    answers = Gauge("alignkit_answers", "answers in progress", registry=now)
    answers.set(service.admission.answers)
    queued = Gauge("alignkit_queued_prompt_tokens", "prompt tokens of answers without a token yet", registry=now)
    queued.set(service.admission.queued_tokens)
    gauges: dict[str, Gauge] = {}
    for one in service.roster.loaded():
        for name, value in one.engine.figures().items():
            gauge = gauges.setdefault(name, Gauge(f"alignkit_engine_{name}", f"of an engine: {name}", ["policy"], registry=now))
            gauge.labels(one.version.name).set(value)
    counted: CollectorRegistry = request.app.state.figures
    return PlainTextResponse((generate_latest(counted) + generate_latest(now)).decode(), media_type="text/plain; version=0.0.4")
