"""How long to wait before a service is asked again: after a failure, after many of them, and when it says so itself."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

_FIRST_SECONDS, _MOST_SECONDS = 0.5, 30.0


def backoff(failures: int, draw: random.Random) -> float:
    """Seconds before the next try: twice as long after each failure, and up to half of it less, so that clients do not come in step."""
    return float(min(_MOST_SECONDS, _FIRST_SECONDS * 2.0 ** (min(failures, 16) - 1)) * draw.uniform(0.5, 1.0))


def retry_after(header: str | None, now: datetime) -> float:
    """Seconds that a service asks to be left alone for: a number, or a date (RFC 9110, section 10.2.3). 0 where it says nothing of use."""
    if header is None:
        return 0.0
    if header.strip().isdecimal():
        return float(header)
    try:
        when = parsedate_to_datetime(header)
    except ValueError:
        return 0.0
    return max(0.0, ((when if when.tzinfo else when.replace(tzinfo=UTC)) - now).total_seconds())


class Breaker:
    """After ``failures`` failed requests in a row nobody asks for ``cooldown`` seconds; then one tries, and all follow if it succeeds."""

    def __init__(self, failures: int, cooldown: float, clock: Callable[[], float]) -> None:
        self._limit, self._cooldown, self._clock = failures, cooldown, clock
        self._failed = 0
        self._next = 0.0
        self.trouble = ""  # what the last failure was

    def wait(self) -> float:
        """Seconds until the caller may ask. 0: now; while the service is away, nobody else may for the next ``cooldown`` seconds."""
        if self._failed < self._limit:
            return 0.0
        left = self._next - self._clock()
        if left > 0.0:
            return left
        self._next = self._clock() + self._cooldown
        return 0.0

    def succeeded(self) -> None:
        """The service is there."""
        self._failed = 0

    def failed(self, trouble: str) -> bool:
        """Count a failure; whether it is the one from which on the service is left alone."""
        self.trouble = trouble
        self._failed += 1
        self._next = self._clock() + self._cooldown
        return self._failed == self._limit
