"""The engine of this process: one thread that steps the decoder of ``alignkit.rollout``; requests join and leave between any two steps."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from alignkit.api import DataError, Policy, Prompt
from alignkit.guards.memory import attempt, release
from alignkit.models.decoding import Decoding
from alignkit.rollout.decoder import Decoder, Event, Request
from alignkit.rollout.filters import Filters
from alignkit.rollout.noise import noise_key
from alignkit_serve.engine import Capabilities, Encoded, EngineError, Likely, Parameters, Piece, PromptError, Token
from alignkit_serve.text import TextStream, TokenBytes

_PREFILL_TOKENS = 1024
"""Prompt tokens of one step: while they are computed, nobody's answer grows."""

_TOP_LOGPROBS = 20

_LOG = logging.getLogger(__name__)


class TorchEngine:
    """Answers with one policy. At most ``max_rows`` answers grow at once, the others wait in the order in which they came.

    Made in a running event loop, to which it delivers. ``batch_invariant`` is not believed but tried, once, with this policy. When memory
    does not suffice for a step, the answers that were growing or waiting are refused, and it goes on with those that come later.
    """

    name = "torch"

    def __init__(self, policy: Policy, codec: Any, *, context_tokens: int, max_rows: int) -> None:
        self._policy, self._codec = policy, codec
        self._context_tokens, self._max_rows = context_tokens, max_rows
        self._bytes = TokenBytes(codec.tokenizer)
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._inbox: queue.SimpleQueue[Callable[[Decoder], None] | None] = queue.SimpleQueue()
        self._answers: dict[int, asyncio.Queue[Event | EngineError]] = {}
        self._of: dict[int, int] = {}  # the decoder's number of an answer -> ours; the thread's
        self._scores: set[asyncio.Future[list[float]]] = set()
        self._ended: str | None = None  # why nothing is generated any more
        self._rows = self._waiting = self._drawn = 0
        self._invariant = False
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="alignkit-engine", daemon=True)
        self._thread.start()

    async def started(self) -> TorchEngine:
        """Wait until the weights are prepared. Raises ``EngineError`` when that failed."""
        await asyncio.to_thread(self._ready.wait)
        if self._ended:
            raise self._stopped()
        return self

    def capabilities(self) -> Capabilities:
        """Everything but what no engine here has."""
        return Capabilities(
            context_tokens=self._context_tokens,
            top_logprobs=_TOP_LOGPROBS,
            behaviour_logprobs=True,
            token_ids=True,
            top_k=True,
            batch_invariant=self._invariant,
            vocabulary=len(self._codec.tokenizer),
        )

    def encode(self, prompt: Prompt) -> Encoded:
        """The prompt in the policy's own template."""
        try:
            ids = self._codec.prompt(prompt)
        except DataError as error:
            raise PromptError(str(error)) from error
        if not ids:
            raise PromptError("the prompt has no tokens")
        return Encoded(prompt, ids, len(ids))

    async def generate(self, prompt: Encoded, parameters: Parameters) -> AsyncGenerator[Piece]:
        """One answer. Its row leaves the batch as soon as the iterator is closed."""
        if self._ended:
            raise self._stopped()
        number, events = next(self._numbers), asyncio.Queue[Event | EngineError]()
        self._answers[number] = events
        request = self._request(prompt, parameters)
        self._inbox.put(lambda decoder: self._take_in(decoder, number, request))
        stream = TextStream(self._codec.tokenizer, parameters.stop)
        try:
            while True:
                event = await events.get()
                if isinstance(event, EngineError):
                    raise event
                piece = stream.take(self._token(event), event.finished)
                yield piece
                if piece.finished:
                    return
        finally:
            del self._answers[number]
            self._inbox.put(lambda decoder: self._let_go(decoder, number))

    async def score(self, ids: Sequence[int]) -> list[float]:
        """Log-probabilities of a sequence's tokens but the first, by the weights and products that answer (nats)."""
        if self._ended:
            raise self._stopped()
        found: asyncio.Future[list[float]] = self._loop.create_future()
        self._scores.add(found)
        self._inbox.put(lambda decoder: self._post(partial(self._scored, found, attempt(lambda: decoder.score(ids)))))
        try:
            return await found
        finally:
            self._scores.discard(found)

    async def close(self) -> None:
        """End the thread and let go of the weights."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def problem(self) -> str | None:
        """What its thread stopped of."""
        return None if self._ended is None else str(self._stopped())

    def figures(self) -> Mapping[str, float]:
        """As of the last step."""
        return {"rows": self._rows, "waiting": self._waiting, "tokens": self._drawn}

    def _request(self, prompt: Encoded, parameters: Parameters) -> Request:
        room = self._context_tokens - len(prompt.ids)
        seed, choice = parameters.noise
        return Request(
            ids=prompt.ids,
            max_new_tokens=min(room, parameters.max_tokens or room),
            temperature=parameters.temperature,
            stop_ids=self._codec.stop_ids,
            noise_key=noise_key(seed, 0, "", choice),
            filters=Filters(
                frequency_penalty=parameters.frequency_penalty,
                presence_penalty=parameters.presence_penalty,
                bias=parameters.logit_bias,
                top_k=parameters.top_k,
                top_p=parameters.top_p,
            ),
            report=parameters.top_logprobs,
        )

    def _token(self, event: Event) -> Token:
        assert event.raw is not None
        likeliest = tuple(Likely(self._bytes(token), logprob) for token, logprob in event.likeliest)
        return Token(event.token, self._bytes(event.token), event.raw, event.logprob, likeliest)

    # From here on: in the thread.

    def _run(self) -> None:
        try:
            with self._policy.decoding() as model:
                self._invariant = batch_invariant(model)
                self._ready.set()
                while not attempt(partial(self._work, model)):
                    self._begin_anew()
            self._ended = "it was closed"
        # The thread's outermost frame: whatever went wrong is told to everyone who waits, and to everyone who comes later.
        except BaseException as error:
            self._ended = f"{type(error).__name__}: {error}"
        finally:
            self._post(self._give_up)
            self._ready.set()

    def _work(self, model: Decoding) -> bool:
        """Answer until it is closed; returns True then."""
        decoder = Decoder(model, max_rows=self._max_rows, prefill_tokens=_PREFILL_TOKENS, together=not self._invariant)
        while True:
            while not decoder.busy or not self._inbox.empty():
                change = self._inbox.get()
                if change is None:
                    return True
                change(decoder)
            events = [(self._of.get(event.request), event) for event in decoder.step()]
            self._rows, self._waiting = decoder.rows, decoder.waiting
            self._drawn += len(events)
            for _, event in events:
                if event.finished:
                    self._of.pop(event.request, None)
            self._post(partial(self._deliver, events))

    def _begin_anew(self) -> None:
        """After a step that did not fit into memory, whose decoder is gone: with half the rows, unless it was a single answer's fault."""
        release()
        lost = list(self._of.values())
        if len(lost) > 1:
            self._max_rows = max(1, self._max_rows // 2)
        _LOG.error("out of memory: answers refused: %d; at most %d grow at once from here on", len(lost), self._max_rows)
        self._of.clear()
        self._rows = self._waiting = 0
        self._post(partial(self._refuse, lost))

    def _take_in(self, decoder: Decoder, number: int, request: Request) -> None:
        self._of[decoder.add(request)] = number

    def _let_go(self, decoder: Decoder, number: int) -> None:
        for inner in [inner for inner, ours in self._of.items() if ours == number]:
            decoder.cancel(inner)
            del self._of[inner]
        self._rows, self._waiting = decoder.rows, decoder.waiting

    def _post(self, work: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and everyone who waited with it
            self._loop.call_soon_threadsafe(work)

    # In the event loop again.

    def _deliver(self, events: Sequence[tuple[int | None, Event]]) -> None:
        for number, event in events:
            if number is not None and number in self._answers:
                self._answers[number].put_nowait(event)

    def _scored(self, found: asyncio.Future[list[float]], scores: list[float] | None) -> None:
        if found.done():
            return
        if scores is None:
            found.set_exception(_out_of_memory())
        else:
            found.set_result(scores)

    def _refuse(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            if number in self._answers:
                self._answers[number].put_nowait(_out_of_memory())

    def _give_up(self) -> None:
        for events in self._answers.values():
            events.put_nowait(self._stopped())
        for found in self._scores:
            if not found.done():
                found.set_exception(self._stopped())

    def _stopped(self) -> EngineError:
        return EngineError(f"the engine has stopped: {self._ended}")


def _out_of_memory() -> EngineError:
    return EngineError("out of memory; ask again, for less at once")


def batch_invariant(model: Decoding) -> bool:
    """Whether a few requests are answered to the last bit alike alone and side by side. Tried, because it depends on the library's
    products for this model's shapes on this processor.
    """
    base = Request(tuple(range(1, 20)), 6, 1.0, (), 0, report=1)
    asked = [replace(base, ids=base.ids[: 3 + i], noise_key=i, temperature=0.5 + i / 8) for i in range(16)]
    crowd = Decoder(model, max_rows=len(asked), together=False)
    together = _drain(crowd, [crowd.add(one) for one in asked])
    for i in (0, 5, 15):
        alone = Decoder(model, max_rows=1, together=False)
        if _drain(alone, [alone.add(asked[i])])[0] != together[i]:
            return False
    return True


def _drain(decoder: Decoder, numbers: Sequence[int]) -> list[list[Event]]:
    """The events of each request, without its number."""
    found: dict[int, list[Event]] = {number: [] for number in numbers}
    while decoder.busy:
        for event in decoder.step():
            found[event.request].append(replace(event, request=0))
    return [found[number] for number in numbers]
