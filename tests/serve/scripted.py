"""A server that answers what a test tells it to, in the API's form, over a real connection."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from alignkit_serve.page import PAGES, page

POLICY = "ppo-7f3a"
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class Says:
    """An answer in these pieces, a token each. ``then``: how it ends; "never": it goes on until its reader is gone."""

    pieces: tuple[str, ...]
    then: str = "stop"  # stop | length | never | broken | error: MESSAGE

    def __init__(self, *pieces: str, then: str = "stop") -> None:
        object.__setattr__(self, "pieces", pieces)
        object.__setattr__(self, "then", then)


@dataclass(frozen=True)
class Refuses:
    """An error before the first byte."""

    status: int
    message: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Scripted:
    """``answers``: what comes next. ``seen``: what was asked. ``gone``: a reader has left an answer that never ended."""

    url: str = ""
    models: list[dict[str, Any]] = field(default_factory=lambda: [model("live"), model(POLICY)])
    key: str | None = None
    answers: deque[Says | Refuses] = field(default_factory=deque)
    seen: list[dict[str, Any]] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)

    def refused(self, request: Request) -> Response | None:
        """What an unknown key is told."""
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return refusal(Refuses(401, "there is no such key, or it is not in force"))
        return None


def model(name: str, policy: str = POLICY) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 1, "owned_by": "alignkit", "alignkit": {"policy_version": policy}}


def refusal(what: Refuses) -> Response:
    error = {"message": what.message, "type": "invalid_request_error", "param": None, "code": "scripted"}
    return JSONResponse({"error": error}, what.status, dict(what.headers))


@contextmanager
def serving() -> Iterator[Scripted]:
    """Within, a server runs on a free port of this machine."""
    script = Scripted()
    server = uvicorn.Server(uvicorn.Config(_app(script), port=0, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            thread.join(0.005)
        script.url = "http://{}:{}".format(*server.servers[0].sockets[0].getsockname())
        yield script
    finally:
        server.should_exit = True
        thread.join()


def _app(script: Scripted) -> Starlette:
    async def models(request: Request) -> Response:
        return script.refused(request) or JSONResponse({"object": "list", "data": script.models})

    async def chat(request: Request) -> Response:
        if refused := script.refused(request):
            return refused
        script.seen.append(await request.json())
        answer = script.answers.popleft()
        return refusal(answer) if isinstance(answer, Refuses) else _Stream(script, answer)

    async def file(request: Request) -> Response:
        name = request.path_params.get("name", "chat.html")
        if name not in PAGES:
            return Response(status_code=404)
        found = page(name)
        return Response(found.content, media_type=found.media_type, headers={"Content-Security-Policy": CONTENT_SECURITY_POLICY})

    return Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/", file),
            Route("/assets/{name}", file),
        ]
    )


class _Stream(Response):
    def __init__(self, script: Scripted, answer: Says) -> None:
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self._script, self._answer = script, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

        async def put(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        number, then = len(self._script.seen), self._answer.then
        about = {"inference_id": f"chatcmpl-{number}", "policy_version": POLICY}
        await put(_event(about, {"role": "assistant", "content": ""}, choice={"alignkit": {"completion_id": f"choice-{number}"}}))
        await put(b": ping\n\n")
        for piece in self._answer.pieces:
            await put(_event(about, {"content": piece}))
        if then == "never":
            leaving = asyncio.ensure_future(receive())
            while not (await asyncio.wait([leaving], timeout=0.05))[0]:
                await put(b": ping\n\n")
            self._script.gone.set()
        elif then == "broken":
            await put(b"", more=False)
        elif then.startswith("error: "):
            error = {"message": then.removeprefix("error: "), "type": "server_error", "param": None, "code": "scripted"}
            await put(b"data: " + json.dumps({"error": error}).encode() + b"\n\ndata: [DONE]\n\n", more=False)
        else:
            await put(_event(about, {}, choice={"finish_reason": then}))
            used = {"prompt_tokens": 5, "completion_tokens": len(self._answer.pieces), "total_tokens": 5 + len(self._answer.pieces)}
            await put(_event(about, usage=used) + b"data: [DONE]\n\n", more=False)


def _event(about: Any, delta: Any = None, *, choice: Any = None, usage: Any = None) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, **(choice or {})}]
    chunk = {"id": about["inference_id"], "object": "chat.completion.chunk", "created": 1, "model": POLICY, "choices": choices}
    # As the API writes it: whatever JSON allows within a string is there as it is.
    return b"data: " + json.dumps({**chunk, "usage": usage, "alignkit": about}, ensure_ascii=False).encode(errors="replace") + b"\n\n"
