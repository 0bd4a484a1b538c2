"""A server to forward to, on a free port of this machine, that answers what it was told to and keeps what it was asked."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import uvicorn

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Reply:
    """``frames`` go out one by one. Then the body ends, the connection breaks, or nothing more happens until the other side leaves."""

    frames: Sequence[bytes] = ()
    status: int = 200
    content_type: str = "text/event-stream; charset=utf-8"
    headers: Mapping[str, str] = field(default_factory=dict)
    then: Literal["ends", "breaks", "waits"] = "ends"


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    headers: Mapping[str, str]
    body: Any


class Upstream:
    """One reply a request, in order. ``left``: set when somebody went away from a reply that waits."""

    def __init__(self) -> None:
        self.replies: deque[Reply] = deque()
        self.asked: list[Asked] = []
        self.connections: list[int] = []  # from which port of the client each request came
        self.left = threading.Event()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def will(self, *replies: Reply) -> None:
        self.replies.extend(replies)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message["body"]
            if not message["more_body"]:
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.connections.append(scope["client"][1])
        self.asked.append(Asked(scope["method"], scope["path"], headers, json.loads(body) if body else None))
        reply = self.replies.popleft()
        sent = {"content-type": reply.content_type, **reply.headers}
        await send({"type": "http.response.start", "status": reply.status, "headers": [(k.encode(), v.encode()) for k, v in sent.items()]})
        for frame in reply.frames:
            await send({"type": "http.response.body", "body": frame, "more_body": True})
            await asyncio.sleep(0.001)  # lets each frame be a packet of its own
        if reply.then == "breaks":
            raise ConnectionAbortedError("as the test wants it")
        if reply.then == "waits":
            await receive()
            self.left.set()
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@contextmanager
def running_upstream() -> Iterator[Upstream]:
    """In a thread, for as long as the test lasts."""
    upstream = Upstream()
    server = uvicorn.Server(uvicorn.Config(upstream, port=0, lifespan="off", log_level="critical"))
    started = threading.Event()
    begin = server.startup

    async def startup(sockets: Any = None) -> None:
        await begin(sockets)
        upstream.port = server.servers[0].sockets[0].getsockname()[1]
        started.set()

    with mock.patch.object(server, "startup", startup):
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            assert started.wait(30)
            yield upstream
        finally:
            server.should_exit = True
            thread.join()


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def one(token: str | bytes, logprob: float, *likeliest: tuple[str, float]) -> dict[str, Any]:
    """A token as chat chunks list it."""
    data = token if isinstance(token, bytes) else token.encode()
    top = [{"token": text, "logprob": value, "bytes": list(text.encode())} for text, value in likeliest]
    return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data), "top_logprobs": top}


def chunk(text: str = "", tokens: Sequence[dict[str, Any]] | None = None, finish: str | None = None, **more: Any) -> bytes:
    """A chunk of a chat."""
    logprobs = None if tokens is None else {"content": list(tokens)}
    return event({"choices": [{"index": 0, "delta": {"content": text}, "logprobs": logprobs, "finish_reason": finish, **more}]})


def ready_made(text: str = "Hi", **more: Any) -> Reply:
    """A whole answer of one token."""
    usage = event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}})
    begin = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
    return Reply((begin, chunk(text, [one(text, -0.5)], **more), chunk(finish="stop"), usage, DONE))


def models(*entries: dict[str, Any]) -> Reply:
    """The answer to /v1/models."""
    return Reply((json.dumps({"object": "list", "data": list(entries)}).encode(),), content_type="application/json")


def refusal(status: int, body: Any, **headers: str) -> Reply:
    """An error before the first byte of an answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Reply((data,), status, "application/json", {name.replace("_", "-"): value for name, value in headers.items()})


def said(message: str) -> dict[str, Any]:
    """OpenAI's form of an error."""
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
