"""One request in progress: its answers drawn side by side, handed out piece by piece, and stored before the client hears that it is done.

The drawing is a task of its own: a client that goes away, reads too slowly or takes too long ends it, and what had been drawn is stored.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from sqlalchemy import Connection

from alignkit_serve.admission import Admission, Ticket
from alignkit_serve.engine import Encoded, EngineError, Finish, Parameters, Piece, PromptError, Token
from alignkit_serve.errors import ApiError, invalid, too_late, unavailable
from alignkit_serve.redaction import Redact, unchanged
from alignkit_serve.roster import Serving
from alignkit_serve.settings import Limits
from alignkit_serve.store import Store, StoreError, groups, inferences
from alignkit_serve.store.groups import Group
from alignkit_serve.store.inferences import Completion, Inference

Status = Literal["done", "error", "cancelled"]

_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class Choice:
    """One answer, and what there is of it. ``shown``: a choice that is not is stored all the same (a shadow)."""

    index: int
    id: str
    inference_id: str
    serving: Serving
    prompt: Encoded
    parameters: Parameters
    shown: bool = True
    text: list[str] = field(default_factory=list)
    drawn: list[Token] = field(default_factory=list)
    finished: Finish | None = None

    def completion(self) -> Completion:
        """As it was drawn, finished or not."""
        return Completion(
            id=self.id,
            inference_id=self.inference_id,
            idx=self.index,
            text="".join(self.text),
            token_ids=_all_or_none([token.id for token in self.drawn]) or (),
            raw_logprobs=_all_or_none([token.raw for token in self.drawn]),
            behaviour_logprobs=_all_or_none([token.behaviour for token in self.drawn]),
            finish_reason=self.finished or "incomplete",
            policy_version_id=self.serving.version.id,
        )


@dataclass(frozen=True, slots=True)
class Record:
    """What is stored of a request: one inference a prompt, and which of its answers are to be compared; empty where nothing is.

    ``redact``: what becomes of the answers' texts; ``redacted``: the inferences whose prompts were changed by it.
    """

    inferences: tuple[Inference, ...] = ()
    groups: tuple[Group, ...] = ()
    redact: Redact = unchanged
    redacted: frozenset[str] = frozenset()

    def kept(self, drawn: Completion) -> Completion:
        """A completion as it is stored."""
        text = self.redact(drawn.text)
        if text != drawn.text:
            # The ids of its tokens would tell what it was.
            return replace(drawn, text=text, token_ids=(), raw_logprobs=None, behaviour_logprobs=None)
        if drawn.inference_id in self.redacted:
            # They are those of an answer to another prompt than the one that is stored, and nobody would know who trains on them.
            return replace(drawn, raw_logprobs=None, behaviour_logprobs=None)
        return drawn


@dataclass(frozen=True, slots=True)
class End:
    """No piece follows. ``error`` is what the client is told instead of a good end."""

    error: ApiError | None = None


class Answers:
    """Draws ``choices``. Begin with ``start()``, take pieces until they end, and ``cancel()`` whenever nobody wants them any more."""

    def __init__(
        self, choices: Sequence[Choice], record: Record, store: Store, admission: Admission, ticket: Ticket, limits: Limits
    ) -> None:
        self.choices = choices
        self._record, self._store = record, store
        self._admission, self._ticket, self._limits = admission, ticket, limits
        self._events: asyncio.Queue[tuple[Choice, Piece] | End] = asyncio.Queue(max(limits.unread_events, 4 * len(choices)))
        self._task: asyncio.Task[None] | None = None
        self._unwanted = asyncio.Event()
        self._reason: ApiError | None = None

    @property
    def group_id(self) -> str | None:
        """What compares its answers, where there are several and they are stored."""
        return self._record.groups[0].id if self._record.groups else None

    async def start(self, over: Callable[[], None]) -> None:
        """Store what was asked, durably, then begin. ``over`` is called at the very end, however that comes. Raises ``ApiError`` 503."""
        try:
            if self._record.inferences:
                await self._written(self._begin)
        except BaseException:
            over()
            raise
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(lambda _: over())

    async def next(self) -> tuple[Choice, Piece] | None:
        """The next piece of any shown choice; None when all have ended well and are stored. Raises ``ApiError``."""
        event = await self._events.get()
        if isinstance(event, End):
            if event.error:
                raise event.error
            return None
        return event

    def cancel(self, reason: ApiError | None = None) -> None:
        """End it; what was drawn is kept, and the client, if it is still there, is told the ``reason``. Too late, it changes nothing."""
        self._reason = self._reason or reason
        self._unwanted.set()

    async def _run(self) -> None:
        tasks = [asyncio.create_task(self._draw(choice)) for choice in self.choices]
        drawing = asyncio.gather(*tasks)
        unwanted = asyncio.ensure_future(self._unwanted.wait())
        both: list[asyncio.Future[Any]] = [drawing, unwanted]
        await asyncio.wait(both, timeout=self._limits.total_seconds, return_when=asyncio.FIRST_COMPLETED)
        status, error = self._outcome(drawing)
        # Of several answers one may have failed and the others not.
        for each in (*both, *tasks):
            each.cancel()
        await asyncio.gather(drawing, *tasks, return_exceptions=True)
        try:
            await self._store_answers(status)
        except ApiError as problem:
            error = error or problem
        # The reader may be slow, and one who does not read for long is not told.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.write_seconds):
                await self._events.put(End(error))

    def _outcome(self, drawing: asyncio.Future[list[None]]) -> tuple[Status, ApiError | None]:
        if drawing.done():
            failed = drawing.exception()
            return ("error", _told(failed)) if failed else ("done", None)
        if self._unwanted.is_set():
            return "cancelled", self._reason
        return "error", too_late(f"the answer took longer than {self._limits.total_seconds:g} s")

    async def _draw(self, choice: Choice) -> None:
        pieces = choice.serving.engine.generate(choice.prompt, choice.parameters)
        async with contextlib.aclosing(pieces):
            try:
                async with asyncio.timeout(self._limits.first_token_seconds):
                    self._take(choice, await anext(pieces))
            except TimeoutError as error:
                raise too_late(f"no token came within {self._limits.first_token_seconds:g} s") from error
            self._ticket.first_token()
            async for piece in pieces:
                self._take(choice, piece)

    def _take(self, choice: Choice, piece: Piece) -> None:
        choice.text.append(piece.text)
        choice.drawn.extend(piece.drawn)
        choice.finished = piece.finished
        if piece.prompt_tokens is not None:
            choice.prompt = replace(choice.prompt, tokens=piece.prompt_tokens)
        self._admission.count(len(piece.drawn))
        if choice.shown and (piece.text or piece.shown or piece.drawn or piece.finished):
            try:
                self._events.put_nowait((choice, piece))
            except asyncio.QueueFull as error:
                raise ApiError(
                    408, "client_too_slow", "the client does not read what it asked for", headers={"x-should-retry": "false"}
                ) from error

    def _begin(self, connection: Connection) -> None:
        for asked in self._record.inferences:
            inferences.begin(connection, asked, redacted=asked.id in self._record.redacted)

    async def _store_answers(self, status: Status) -> None:
        if not self._record.inferences:
            return

        record = self._record
        drawn = [choice.completion() for choice in self.choices]
        kept = [record.kept(each) for each in drawn]
        redacted = {one.inference_id for one, other in zip(drawn, kept, strict=True) if one.text != other.text}

        def finish(connection: Connection) -> None:
            for inference in record.inferences:
                mine = [choice for choice in self.choices if choice.inference_id == inference.id]
                inferences.finish(
                    connection,
                    inference.id,
                    [each for each in kept if each.inference_id == inference.id],
                    status=status,
                    prompt_tokens=mine[0].prompt.tokens or 0,
                    completion_tokens=sum(len(choice.drawn) for choice in mine),
                    redacted=inference.id in redacted,
                )
            if status == "done":
                for group in record.groups:
                    groups.add_group(connection, group)

        await self._written(finish)

    async def _written(self, work: Callable[[Connection], object]) -> None:
        try:
            await self._store.awrite(work)
        except StoreError as error:
            raise unavailable("store_unavailable", f"the answer cannot be stored: {error}", 5) from error


T = TypeVar("T")


def _all_or_none(values: Sequence[T | None]) -> tuple[T, ...] | None:
    """The values, where every token has one: half of them would be of no use to anyone."""
    known = tuple(value for value in values if value is not None)
    return known if len(known) == len(values) else None


def _told(error: BaseException) -> ApiError:
    """What a client is told of a failure. Whatever has no message for it is a bug: the log has all of it, the client nothing."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptError):
        return invalid(str(error), "messages", "invalid_prompt")
    if isinstance(error, EngineError):
        return unavailable("engine_unavailable", str(error), 10)
    _LOG.error("an answer failed", exc_info=error)
    return ApiError(500, "internal_error", "the server made a mistake; its log has the details")
