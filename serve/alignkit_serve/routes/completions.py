"""``POST /v1/chat/completions`` and ``POST /v1/completions``."""

from __future__ import annotations

import time
from urllib.parse import quote

from fastapi import APIRouter, Request
from starlette.responses import Response

from alignkit_serve import service as asking
from alignkit_serve.answers import Answers
from alignkit_serve.auth import Infer
from alignkit_serve.routes.serving import serving
from alignkit_serve.schemas import ChatRequest, CompletionRequest, Sampled, ignored
from alignkit_serve.service import Asked
from alignkit_serve.streams import EventStream, watch, whole
from alignkit_serve.wire import Form, fingerprint

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat(request: Request, body: ChatRequest, caller: Infer) -> Response:
    """The answer to a conversation."""
    return await _answer(request, asking.chat(body, request.state.request_id, caller.key))


@router.post("/v1/completions")
async def complete(request: Request, body: CompletionRequest, caller: Infer) -> Response:
    """The continuation of a text."""
    return await _answer(request, asking.continuation(body, request.state.request_id, caller.key))


async def _answer(request: Request, asked: Asked) -> Response:
    service = serving(request)
    unread = ignored(asked.request)
    if asked.key:
        service.admission.meter(asked.key)
    answers = await service.begin(asked)
    form = _form(asked, answers)
    # A header takes only some letters and no space at its ends, and a name may be anything.
    headers = {"X-Alignkit-Policy": quote(form.policy, safe="@")} if form.policy else {}
    if unread:
        names = ", ".join(name.encode("ascii", "replace").decode() for name in unread if name.isprintable())
        headers["X-Alignkit-Ignored"] = names[:1000].strip()
    if not asked.request.stream:
        return await whole(answers, request.receive, form, headers)
    watching = watch(request.receive, answers)
    try:
        first = await answers.next()
    except BaseException:
        answers.cancel()
        raise
    finally:
        watching.cancel()
    return EventStream(answers, first, form, service.limits, headers)


def _form(asked: Asked, answers: Answers) -> Form:
    request: Sampled = asked.request
    blind = request.alignkit.ab == "pair"
    version = answers.choices[0].serving.version
    extras = request.alignkit
    if request.return_token_ids:
        extras = extras.model_copy(update={"return_token_ids": True})
    return Form(
        id=answers.choices[0].inference_id,
        created=int(time.time()),
        model=request.model if blind else version.name,
        chat=asked.endpoint == "chat",
        top_logprobs=asked.top_logprobs,
        wants_usage=bool(request.stream and request.stream_options and request.stream_options.include_usage),
        extras=extras,
        policy=None if blind else version.name,
        fingerprint="fp_blind" if blind else fingerprint(version.id),
        about={"group_id": answers.group_id} if answers.group_id else {},
    )
