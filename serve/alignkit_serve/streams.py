"""Responses that end when their reader goes: server-sent events as answers grow, and one body when all have ended."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from fastapi.responses import JSONResponse
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from alignkit_serve.answers import Answers, Choice
from alignkit_serve.engine import Piece, Token
from alignkit_serve.errors import ApiError
from alignkit_serve.settings import Limits
from alignkit_serve.wire import DONE, PING, Form, event


class EventStream(Response):
    """The answers as chunks. ``first``: their first piece, which has come already, so that errors before it have a status of their own."""

    def __init__(
        self, answers: Answers, first: tuple[Choice, Piece] | None, form: Form, limits: Limits, headers: Mapping[str, str]
    ) -> None:
        own = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(headers={**own, **headers}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._answers, self._first, self._form, self._limits = answers, first, form, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the answers end or the client goes."""
        watching = watch(receive, self._answers)
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await self._send_all(send)
        except TimeoutError:
            pass  # The client reads nothing any more; the connection is closed with the answer unfinished.
        finally:
            self._answers.cancel()
            watching.cancel()

    async def _send_all(self, send: Send) -> None:
        async def put(data: bytes, more: bool = True) -> None:
            async with asyncio.timeout(self._limits.write_seconds):
                await send({"type": "http.response.body", "body": data, "more_body": more})

        found = self._first
        try:
            while found is not None:
                await put(b"".join(self._form.chunks(*found)))
                found = await self._next(put)
        except ApiError as error:
            await put(event(error.body()) + DONE, more=False)
            return
        usage = self._form.usage_chunk(self._answers.choices) if self._form.wants_usage else b""
        await put(usage + DONE, more=False)

    async def _next(self, put: Callable[[bytes], Any]) -> tuple[Choice, Piece] | None:
        """The next piece; until it comes, a comment now and then keeps proxies from giving up."""
        coming = asyncio.ensure_future(self._answers.next())
        try:
            while not (await asyncio.wait([coming], timeout=self._limits.ping_seconds))[0]:
                await put(PING)
            return coming.result()
        finally:
            coming.cancel()


async def whole(answers: Answers, receive: Receive, form: Form, headers: Mapping[str, str]) -> JSONResponse:
    """All answers in one body. Raises ``ApiError``."""
    watching = watch(receive, answers)
    shown: dict[int, list[Token]] = {choice.index: [] for choice in answers.choices}
    try:
        while (found := await answers.next()) is not None:
            choice, piece = found
            shown[choice.index] += piece.shown
    finally:
        answers.cancel()
        watching.cancel()
    return JSONResponse(form.body(answers.choices, shown), headers=dict(headers))


def watch(receive: Receive, answers: Answers) -> asyncio.Task[None]:
    """Cancel the answers when the client goes. The request's body has been read."""

    async def until_gone() -> None:
        with contextlib.suppress(ApiError):  # a body that goes on and on
            while (await receive())["type"] != "http.disconnect":
                pass
        answers.cancel(ApiError(499, "client_closed_request", "the client has gone"))

    return asyncio.create_task(until_gone())
