"""Who may come in: bounded numbers of answers and of prompt tokens that wait, for all and for each key. Nothing queues without a bound."""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from alignkit_serve.errors import busy, unavailable
from alignkit_serve.settings import Limits
from alignkit_serve.store.keys import KeyRecord

_RECENT_SECONDS = 20.0


_REMEMBERED = 10_000


class Meter:
    """How much of what each name may take in a minute is left. The names that were not heard of for the longest time are forgotten."""

    def __init__(self) -> None:
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # name -> (what is left, as of when)

    def take(self, name: str, rpm: int, amount: int = 1) -> int:
        """Take an amount of what is ``rpm`` in a minute: 0 if anything was left, else the seconds until there is again.

        What is taken beyond what was left is missing later.
        """
        now = time.monotonic()
        left, since = self._left.get(name, (float(rpm), now))
        left = min(float(rpm), left + (now - since) * rpm / 60.0)
        if left < 1.0:
            return math.ceil((1.0 - left) * 60.0 / rpm)
        self._left[name] = (left - amount, now)
        self._left.move_to_end(name)
        if len(self._left) > _REMEMBERED:
            self._left.popitem(last=False)
        return 0


@dataclass(slots=True)
class Ticket:
    """An admitted request. ``first_token()`` says that its prompts have been computed."""

    admission: Admission
    key: str
    answers: int
    prompt_tokens: int

    def first_token(self) -> None:
        """Its prompts no longer wait."""
        self.admission.queued_tokens -= self.prompt_tokens
        self.prompt_tokens = 0


class Admission:
    """Counts what is in the house. All of it is of the event loop, and needs no lock."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._of_key: Counter[str] = Counter()
        self._rates = Meter()
        self._drawn: deque[tuple[float, int]] = deque()
        self.answers = self.queued_tokens = 0
        self.draining = False

    @contextmanager
    def admitted(self, key: KeyRecord | None, answers: int, prompt_tokens: int) -> Iterator[Ticket]:
        """Within, the request is in. Raises ``ApiError``: 429 when there is no room, 503 when the server is about to stop."""
        name = key.id if key else ""
        self._check(key, name, answers, prompt_tokens)
        ticket = Ticket(self, name, answers, prompt_tokens)
        self.answers += answers
        self.queued_tokens += prompt_tokens
        self._of_key[name] += answers
        try:
            yield ticket
        finally:
            ticket.first_token()
            self.answers -= answers
            self._of_key[name] -= answers
            if not self._of_key[name]:
                del self._of_key[name]

    def count(self, tokens: int) -> None:
        """So many tokens were drawn now."""
        now = time.monotonic()
        self._drawn.append((now, tokens))
        while self._drawn[0][0] < now - _RECENT_SECONDS:
            self._drawn.popleft()

    def wait_seconds(self) -> int:
        """When it is worth coming again: what waits over what was lately done in a second, between 1 and 60."""
        if not self._drawn:
            return 1
        span = max(1.0, time.monotonic() - self._drawn[0][0])
        rate = sum(tokens for _, tokens in self._drawn) / span
        return min(60, max(1, math.ceil(self.queued_tokens / max(rate, 1.0))))

    def meter(self, key: KeyRecord | None, amount: int = 1) -> None:
        """Take a request, or several in one, from what the key may ask in a minute. Raises ``ApiError`` 429 when nothing is left."""
        if key is None or key.rate_rpm is None:
            return
        if seconds := self._rates.take(key.id, key.rate_rpm, amount):
            raise busy("rate_limited", f"this key may ask {key.rate_rpm} times a minute", seconds)

    def _check(self, key: KeyRecord | None, name: str, answers: int, prompt_tokens: int) -> None:
        if self.draining:
            raise unavailable("draining", "the server is about to stop; ask again when it is back", 5)
        if key and key.max_inflight is not None and self._of_key[name] + answers > key.max_inflight:
            message = f"this key may have {key.max_inflight} answers in progress and would have {self._of_key[name] + answers}"
            raise busy("key_concurrency", message, self.wait_seconds())
        if self.answers + answers > self._limits.queued_requests:
            message = f"{self.answers} answers are in progress, and {self._limits.queued_requests} is the limit"
            raise busy("queue_full", message, self.wait_seconds())
        # A prompt longer than the limit is let in when it has the queue to itself.
        if self.queued_tokens and self.queued_tokens + prompt_tokens > self._limits.queued_tokens:
            message = f"{self.queued_tokens} prompt tokens are waiting, and {self._limits.queued_tokens} is the limit"
            raise busy("queue_full", message, self.wait_seconds())
