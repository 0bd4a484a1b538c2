"""What people say of answers. Whoever gets a 2xx can rely on it: it was checked, and it is on the disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import ConfigDict, TypeAdapter, ValidationError

from alignkit_serve.auth import Admin, Caller, Giver, Judge, Keys, Reader
from alignkit_serve.desk import Desk, refusal
from alignkit_serve.errors import ApiError, problems
from alignkit_serve.judgements import KINDS, Batch, IdempotencyKey, Judgement, MetricDefinition, Revision, TokenRequest, opinion
from alignkit_serve.redaction import kept_of
from alignkit_serve.routes.serving import serving
from alignkit_serve.store import feedback, inferences, metrics, new_id
from alignkit_serve.store.feedback import Feedback, Kind, Opinion, Outcome, Refused, State
from alignkit_serve.store.metrics import Metric


class _Route(APIRoute):
    """Tells what is wrong with a body without pydantic's name for its kind, and counts it as refused."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own, within."""
        handler = super().get_route_handler()

        async def counted(request: Request) -> Response:
            try:
                return await handler(request)
            except RequestValidationError as error:
                kind = error.body.get("kind") if isinstance(error.body, dict) else None
                _desk(request).count(kind if kind in KINDS else "unknown", None)
                raise RequestValidationError([_untagged(each) for each in error.errors()]) from error

        return counted


router = APIRouter(prefix="/v1/feedback", route_class=_Route)

Key = Annotated[IdempotencyKey | None, Header(alias="Idempotency-Key")]

_JUDGEMENT: TypeAdapter[Any] = TypeAdapter(Judgement)
_KEY: TypeAdapter[str] = TypeAdapter(IdempotencyKey, config=ConfigDict(strict=True))


@router.post("", status_code=201)
async def add(request: Request, caller: Judge) -> Response:
    """Say something of an answer; under the same ``Idempotency-Key`` it is said once, however often it is sent."""
    # Not by FastAPI's parameters, as elsewhere: finding these two takes it as long as all else that happens to a piece of feedback.
    said = _single(request, caller, await _json(request))
    _admit(request, caller, said)
    (outcome,) = await _desk(request).add([said])
    return _answer(outcome)


@router.post(":batch")
async def add_many(request: Request, body: Batch, caller: Judge) -> dict[str, Any]:
    """Say several things. Those that can be are stored, all at once; what became of each is told in their order."""
    serving(request).admission.meter(caller.key, len(body.items))
    read = [_read(request, caller, item) for item in body.items]
    said = [each for each in read if isinstance(each, Opinion)]
    outcomes = iter(await _desk(request).add(said))
    results = [_result(next(outcomes)) if isinstance(each, Opinion) else _failed(each) for each in read]
    return {"object": "list", "data": [{"index": i, **result} for i, result in enumerate(results)]}


@router.get("")
async def listed(
    request: Request,
    caller: Reader,
    target: str | None = None,
    kind: Kind | None = None,
    state: State | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "asc",
) -> dict[str, Any]:
    """A page of what the caller said, or, for an admin, of what anyone said."""
    rows, has_more = await serving(request).store.aread(
        lambda connection: feedback.listed(
            connection,
            caller.author,
            within=caller.within,
            every=caller.sees_all,
            target=target,
            kind=kind,
            state=state,
            after=after,
            limit=limit,
            order=order,
        )
    )
    ends = {"first_id": rows[0].id, "last_id": rows[-1].id} if rows else {"first_id": None, "last_id": None}
    return {"object": "list", "data": [_shown(row) for row in rows], **ends, "has_more": has_more}


@router.post("/tokens", status_code=201)
async def give_token(request: Request, body: TokenRequest, caller: Giver) -> dict[str, Any]:
    """A token for a browser, good for feedback on the answers of one inference that was asked with this key."""
    service, keys = serving(request), request.app.state.keys
    assert isinstance(keys, Keys)
    service.admission.meter(caller.key)
    own = None if caller.sees_all or caller.key is None else caller.key.id
    found = await service.store.aread(lambda connection: inferences.get(connection, body.inference_id, api_key_id=own))
    if found is None:
        raise ApiError(404, "not_found", f"there is no stored inference {body.inference_id!r} of this key", param="inference_id")
    # One who has no name is somebody else with every inference; no name begins so.
    subject = service.end_user(body.user) if body.user else found.inference.end_user_hmac or service.end_user(f"\0{body.inference_id}")
    text, expires = await keys.token(caller, body.inference_id, subject, body.seconds)
    return {"object": "feedback.token", "token": text, "inference_id": body.inference_id, "expires_at": expires}


@router.get("/metrics")
async def listed_metrics(request: Request, caller: Reader) -> dict[str, Any]:
    """Every metric, in all its versions."""
    found = await serving(request).store.aread(metrics.listed)
    return {"object": "list", "data": [_metric(each) for each in found]}


@router.post("/metrics", status_code=201)
async def define_metric(request: Request, body: MetricDefinition, caller: Admin) -> JSONResponse:
    """Define a metric, or another version of one; what is as it was stays."""
    found, new = await serving(request).store.awrite(lambda connection: metrics.define(connection, body.metric(new_id("met-"))))
    return JSONResponse(_metric(found), 201 if new else 200)


@router.get("/{id}")
async def retrieve(request: Request, id: str, caller: Reader) -> dict[str, Any]:
    """One opinion, with those that it superseded and that superseded it, the oldest first."""

    def find(connection: Any) -> tuple[Feedback, list[Feedback]] | None:
        found = feedback.get(connection, id, caller.author, caller.within, every=caller.sees_all)
        return (found, feedback.history(connection, found.first_id)) if found else None

    found = await serving(request).store.aread(find)
    if found is None:
        raise refusal(feedback.unknown(id))
    return {**_shown(found[0]), "history": [_shown(each) for each in found[1]]}


@router.patch("/{id}", status_code=201)
async def revise(request: Request, id: str, body: Revision, caller: Judge, key: Key = None) -> Response:
    """Say something else instead; what was said before is kept, as superseded."""
    # Its target is that of what it supersedes, and known only there.
    said = kept_of(opinion(body, caller.author, caller.within, key, target_type="completion", target_id=id), serving(request).redact)
    _admit(request, caller, said)
    outcome = await serving(request).store.awrite(lambda connection: feedback.revise(connection, id, said, every=caller.sees_all))
    _desk(request).count(said.kind, outcome)
    return _answer(outcome)


@router.delete("/{id}")
async def retract(request: Request, id: str, caller: Judge) -> dict[str, Any]:
    """Take it back; it is kept, as retracted, and trains nothing."""
    serving(request).admission.meter(caller.key)
    outcome = await serving(request).store.awrite(
        lambda connection: feedback.retract(connection, id, caller.author, caller.within, every=caller.sees_all)
    )
    if isinstance(outcome, Refused):
        raise refusal(outcome)
    return _shown(outcome)


def _desk(request: Request) -> Desk:
    desk: Desk = request.app.state.desk
    return desk


def _admit(request: Request, caller: Caller, said: Opinion) -> None:
    try:
        serving(request).admission.meter(caller.key)
        _desk(request).meter(said.target_id)
    except ApiError:
        _desk(request).count(said.kind, None)
        raise


async def _json(request: Request) -> Any:
    """The body. Raises ``RequestValidationError``."""
    kind, _, _ = request.headers.get("content-type", "").partition(";")
    if kind.strip().lower() != "application/json":
        raise RequestValidationError([_wrong("the body must be JSON, sent as Content-Type: application/json")])
    try:
        return await request.json()
    except json.JSONDecodeError as error:
        raise RequestValidationError([{"type": "json_invalid", "loc": ("body", error.pos), "ctx": {"error": error.msg}}]) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise RequestValidationError([_wrong(f"the body cannot be read as JSON: {error}")]) from error


def _wrong(message: str) -> dict[str, Any]:
    return {"type": "value_error", "loc": ("body",), "msg": message}


def _single(request: Request, caller: Caller, body: Any) -> Opinion:
    """What a request says. Raises ``RequestValidationError``."""
    key = request.headers.get("idempotency-key")
    try:
        if key is not None:
            _KEY.validate_python(key)
    except ValidationError as error:
        raise RequestValidationError([{**each, "loc": ("header", "Idempotency-Key")} for each in error.errors()], body=body) from error
    try:
        return _opinion(request, caller, body, key)
    except ValidationError as error:
        raise RequestValidationError(_in_body(error), body=body) from error


def _read(request: Request, caller: Caller, item: Mapping[str, Any]) -> Opinion | ApiError:
    """What an item of a batch says, or what is wrong with it."""
    said = {name: value for name, value in item.items() if name != "idempotency_key"}
    kind = said.get("kind")
    try:
        key = _KEY.validate_python(item.get("idempotency_key"))
    except ValidationError:
        message = "an item needs an idempotency_key, of 1 to 255 characters, under which it is stored once however often the batch is sent"
        found = ApiError(400, "invalid_request", message, param="idempotency_key")
    else:
        try:
            one = _opinion(request, caller, said, key)
            _desk(request).meter(one.target_id)
        except ValidationError as error:
            message, param = problems([_untagged(each) for each in _in_body(error)])
            found = ApiError(400, "invalid_request", message, param=param)
        except ApiError as error:
            found = error
        else:
            return one
    _desk(request).count(kind if kind in KINDS else "unknown", None)
    return found


def _opinion(request: Request, caller: Caller, said: Any, key: str | None) -> Opinion:
    """As it will be stored. Raises ``ValidationError``."""
    return kept_of(opinion(_JUDGEMENT.validate_python(said), caller.author, caller.within, key), serving(request).redact)


def _in_body(error: ValidationError) -> list[Any]:
    return [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]


def _untagged(problem: Mapping[str, Any]) -> dict[str, Any]:
    location = problem["loc"]
    return {**problem, "loc": (*location[:1], *location[2:]) if location[1:2] and location[1] in KINDS else location}


def _answer(outcome: Outcome) -> Response:
    if isinstance(outcome, Refused):
        raise refusal(outcome)
    return JSONResponse(_shown(outcome.feedback), 201 if outcome.new else 200)


def _result(outcome: Outcome) -> dict[str, Any]:
    if isinstance(outcome, Refused):
        return _failed(refusal(outcome))
    return {"status": 201 if outcome.new else 200, "feedback": _shown(outcome.feedback)}


def _failed(error: ApiError) -> dict[str, Any]:
    return {"status": error.status_code, **error.body()}


def _shown(row: Feedback) -> dict[str, Any]:
    """Without what is the server's own, and without which key it came with."""
    return {
        "id": row.id,
        "object": "feedback",
        "kind": row.kind,
        "target_type": row.target_type,
        "target_id": row.target_id,
        "inference_id": row.inference_id,
        "metric_id": row.metric_id,
        "annotator_id": row.annotator_id,
        "value": row.value,
        "rationale": row.rationale,
        "presentation": row.presentation,
        "source": row.source,
        "occurred_at": row.occurred_at.isoformat(),
        "received_at": row.received_at.isoformat(),
        "supersedes_id": row.supersedes_id,
        "state": row.state,
        "reason": row.reason,
    }


def _metric(found: Metric) -> dict[str, Any]:
    return {"object": "metric", **asdict(found)}
