"""``/v1/models``: what can be asked for by name."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from alignkit_serve.auth import Infer
from alignkit_serve.roster import LIVE, Serving
from alignkit_serve.routes.serving import serving

router = APIRouter(prefix="/v1/models")


@router.get("")
async def listed(request: Request, caller: Infer) -> dict[str, Any]:
    """Every policy that is loaded, the live one first, and ``live``, which is whichever that is."""
    roster = serving(request).roster
    return {"object": "list", "data": [_model(LIVE, roster.live()), *(_model(one.version.name, one) for one in roster.loaded())]}


@router.get("/{id:path}")
async def retrieve(request: Request, id: str, caller: Infer) -> dict[str, Any]:
    """One of them."""
    with serving(request).roster.leased(id) as found:
        return _model(id, found)


def _model(name: str, serving: Serving) -> dict[str, Any]:
    can, version = serving.engine.capabilities(), serving.version
    return {
        "id": name,
        "object": "model",
        "created": int(version.created_at.timestamp()),
        "owned_by": "alignkit",
        # Where vLLM's clients look for it.
        "max_model_len": can.context_tokens,
        "alignkit": {
            "policy_version": version.name,
            "state": version.state,
            "engine": serving.engine.name,
            "context_tokens": can.context_tokens,
            "top_logprobs": can.top_logprobs,
            "batch_invariant": can.batch_invariant,
        },
    }
