"""Label tasks, for those who run a labelling: of what the server answered, or of texts from elsewhere. Made twice, they are there once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from sqlalchemy import Connection

from alignkit_serve.auth import Admin
from alignkit_serve.desk import refusal
from alignkit_serve.errors import ApiError
from alignkit_serve.label_requests import Collect, ImportTask, NewTask
from alignkit_serve.routes.serving import serving
from alignkit_serve.store import labels, pool
from alignkit_serve.store.feedback import Refused
from alignkit_serve.store.labels import Task, TaskState
from alignkit_serve.store.pool import Pooled

router = APIRouter(prefix="/v1/label/tasks")


@router.post("", status_code=201)
async def make(request: Request, body: NewTask, caller: Admin) -> JSONResponse:
    """Let completions of one prompt be ranked."""

    def work(connection: Connection) -> tuple[Task, bool] | Refused:
        if body.completion_ids is not None:
            return pool.of_completions(connection, body.completion_ids, body.wanted(), tag=body.tag)
        assert body.group_id is not None
        return pool.of_group(connection, body.group_id, body.wanted())

    return await _made(request, work)


@router.post(":import", status_code=201)
async def bring(request: Request, body: ImportTask, caller: Admin) -> JSONResponse:
    """Let texts from elsewhere be ranked."""
    request_id, key, redact = request.state.request_id, caller.key.id if caller.key else None, serving(request).redact
    messages = [{**message, "content": redact(message["content"])} for message in body.stored()]
    responses = [redact(response) for response in body.responses]

    def work(connection: Connection) -> tuple[Task, bool] | Refused:
        return pool.of_texts(connection, messages, responses, body.wanted(), request_id=request_id, api_key_id=key)

    return await _made(request, work)


@router.post(":collect")
async def collect(request: Request, body: Collect, caller: Admin) -> dict[str, Any]:
    """Let be ranked what traffic left to be compared, and nobody was asked about yet."""

    def work(connection: Connection) -> list[Pooled]:
        return pool.pooled(connection, pool.collect(connection, body.origins, body.wanted(), limit=body.limit))

    made = await serving(request).store.awrite(work)
    return {"object": "list", "data": [_shown(each) for each in made]}


@router.get("")
async def listed(
    request: Request,
    caller: Admin,
    state: TaskState | None = None,
    tag: str | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> dict[str, Any]:
    """A page of tasks with how far they are, or the one that was made under a tag."""

    def find(connection: Connection) -> tuple[list[Pooled], bool]:
        if tag is not None:
            task = pool.tagged(connection, tag)
            return pool.pooled(connection, [task] if task else []), False
        rows, has_more = labels.tasks(connection, state=state, after=after, limit=limit)
        return pool.pooled(connection, [row.task for row in rows]), has_more

    rows, has_more = await serving(request).store.aread(find)
    ends = {"first_id": rows[0].task.id, "last_id": rows[-1].task.id} if rows else {"first_id": None, "last_id": None}
    return {"object": "list", "data": [_shown(row) for row in rows], **ends, "has_more": has_more}


@router.delete("/{id}")
async def withdraw(request: Request, id: str, caller: Admin) -> dict[str, Any]:
    """Ask nobody about it any more; what was said stays."""

    def work(connection: Connection) -> Pooled | None:
        known = labels.get_task(connection, id)
        return pool.pooled(connection, [labels.withdraw(connection, id)])[0] if known else None

    found = await serving(request).store.awrite(work)
    if found is None:
        raise ApiError(404, "not_found", f"there is no task {id!r}", param="id")
    return _shown(found)


async def _made(request: Request, work: Callable[[Connection], tuple[Task, bool] | Refused]) -> JSONResponse:
    def make(connection: Connection) -> tuple[Pooled, bool] | Refused:
        made = work(connection)
        return made if isinstance(made, Refused) else (pool.pooled(connection, [made[0]])[0], made[1])

    outcome = await serving(request).store.awrite(make)
    if isinstance(outcome, Refused):
        raise refusal(outcome)
    found, new = outcome
    return JSONResponse(_shown(found), 201 if new else 200)


def _shown(found: Pooled) -> dict[str, Any]:
    task = found.task
    return {
        "id": task.id,
        "object": "label.task",
        "group_id": task.group_id,
        "prompt_sha256": found.prompt_sha256,
        "completion_ids": list(found.completion_ids),
        "origin": found.origin,
        "tag": found.tag,
        "overlap": task.overlap,
        "priority": task.priority,
        "gold": task.gold,
        "state": task.state,
        "assignments": dict(found.assignments),
        "created_at": task.created_at.isoformat(),
    }
