"""Stored chat completions, as OpenAI's clients list, retrieve, tag and delete them. A key sees what was asked with it, an admin all."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request

from alignkit_serve.auth import Caller, Infer
from alignkit_serve.errors import ApiError
from alignkit_serve.routes.serving import serving
from alignkit_serve.schemas import MetadataUpdate
from alignkit_serve.store import erasure, inferences
from alignkit_serve.store.inferences import StoredInference
from alignkit_serve.wire import fingerprint

router = APIRouter(prefix="/v1/chat/completions")

_METADATA = "metadata["

Limit = Annotated[int, Query(ge=1, le=100)]


@router.get("")
async def listed(
    request: Request,
    caller: Infer,
    model: str | None = None,
    after: str | None = None,
    limit: Limit = 20,
    order: Literal["asc", "desc"] = "asc",
) -> dict[str, Any]:
    """A page of stored completions; ``metadata[KEY]=VALUE`` in the query keeps those that are tagged so."""
    wanted = {
        name.removeprefix(_METADATA).removesuffix("]"): value
        for name, value in request.query_params.items()
        if name.startswith(_METADATA) and name.endswith("]")
    }
    rows, has_more = await serving(request).store.aread(
        lambda connection: inferences.listed(
            connection, api_key_id=_own(caller), model=model, metadata=wanted, after=after, limit=limit, order=order
        )
    )
    return _page([_completion(row) for row in rows], has_more)


@router.get("/{id}")
async def retrieve(request: Request, id: str, caller: Infer) -> dict[str, Any]:
    """One stored completion."""
    return _completion(await _found(request, id, caller))


@router.get("/{id}/messages")
async def messages(
    request: Request, id: str, caller: Infer, after: str | None = None, limit: Limit = 20, order: Literal["asc", "desc"] = "asc"
) -> dict[str, Any]:
    """What was asked, turn by turn."""
    stored = await _found(request, id, caller)
    turns = [{"id": f"{id}-{i}", "name": None, **message} for i, message in enumerate(stored.inference.messages)]
    turns = turns if order == "asc" else turns[::-1]
    begin = next((i + 1 for i, turn in enumerate(turns) if turn["id"] == after), 0)
    return _page(turns[begin : begin + limit], len(turns) > begin + limit)


@router.post("/{id}")
async def update(request: Request, id: str, body: MetadataUpdate, caller: Infer) -> dict[str, Any]:
    """Tag a stored completion anew."""
    await _found(request, id, caller)
    changed = await serving(request).store.awrite(
        lambda connection: inferences.set_metadata(connection, id, body.metadata or {}, api_key_id=_own(caller))
    )
    if not changed:
        raise _missing(id)
    return _completion(await _found(request, id, caller))


@router.delete("/{id}")
async def delete(request: Request, id: str, caller: Infer) -> dict[str, Any]:
    """Erase a stored completion's words, and what was said of it; that there was one stays known."""
    await _found(request, id, caller)
    deleted = await serving(request).store.awrite(
        lambda connection: erasure.delete_inference(connection, id, caller.name, api_key_id=_own(caller))
    )
    if not deleted:
        raise _missing(id)
    return {"object": "chat.completion.deleted", "id": id, "deleted": True}


def _own(caller: Caller) -> str | None:
    """Whose completions a caller sees; None: everybody's."""
    return None if caller.key is None or "admin" in caller.key.scopes else caller.key.id


async def _found(request: Request, id: str, caller: Caller) -> StoredInference:
    stored = await serving(request).store.aread(lambda connection: inferences.get(connection, id, api_key_id=_own(caller)))
    if stored is None or stored.inference.endpoint != "chat" or stored.status != "done":
        raise _missing(id)
    return stored


def _missing(id: str) -> ApiError:
    # Another key's completion is as good as none: whether it exists is nobody else's business.
    return ApiError(404, "not_found", f"there is no stored completion {id!r} of this key", param="id")


def _page(data: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, **ends, "has_more": has_more}


def _completion(stored: StoredInference) -> dict[str, Any]:
    asked, params = stored.inference, stored.inference.params
    prompt, drawn = stored.prompt_tokens or 0, stored.completion_tokens or 0
    return {
        "id": asked.id,
        "object": "chat.completion",
        "created": int(asked.created_at.timestamp()),
        "model": asked.model,
        "request_id": asked.request_id,
        "metadata": asked.metadata,
        "seed": asked.seed,
        "temperature": params["temperature"],
        "top_p": params["top_p"],
        "presence_penalty": params["presence_penalty"],
        "frequency_penalty": params["frequency_penalty"],
        "system_fingerprint": fingerprint(asked.policy_version_id),
        "choices": [
            {
                "index": one.idx,
                "message": {"role": "assistant", "content": one.text, "refusal": None},
                "logprobs": None,
                "finish_reason": one.finish_reason,
                "alignkit": {"completion_id": one.id, "inference_id": asked.id},
            }
            for one in stored.completions
        ],
        "usage": {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn},
        "alignkit": {"inference_id": asked.id},
    }
