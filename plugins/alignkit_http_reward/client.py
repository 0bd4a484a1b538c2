"""Requests to the service: retried while that may help, given up at the deadline, refused when it cannot."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Self

import httpx

from alignkit.api import RunError, Sample, Score
from alignkit_http_reward.patience import Breaker, backoff, retry_after
from alignkit_http_reward.wire import BYTES_PER_SAMPLE, Garbled, WrongAnswer, read_scores, request_body, shown

if TYPE_CHECKING:
    from ssl import SSLContext

    from alignkit_http_reward import HTTPConfig

_PASSING = frozenset([408, 425, 429])
"""Statuses below 500 after which asking again may help."""

_NAP_SECONDS = 1.0  # whoever waits looks this often whether there is still something to wait for


class GivenUp(Exception):
    """There was no answer in time; the message says how it was tried."""


class NotAsked(Exception):
    """The client was closed before there was an answer."""


class _Trouble(Exception):
    """A request failed in a way that may pass. ``wait``: seconds that the service asks to be left alone for."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


@dataclass(frozen=True)
class Time:
    """The clock and the sleep of everything that waits, and the chance in how long."""

    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    draw: random.Random = field(default_factory=random.Random)  # its own: training's generators are not touched


class Client:
    """The conversation of one call of ``score``. ``close``: no new request is made, and those on their way are waited for."""

    def __init__(
        self, config: HTTPConfig, key: str | None, tls: SSLContext, breaker: Breaker, time: Time, say: Callable[[str], None]
    ) -> None:
        self._config, self._breaker, self._time, self._say = config, breaker, time, say
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        self._http = httpx.AsyncClient(
            headers=headers | ({"Authorization": f"Bearer {key}"} if key else {}),
            follow_redirects=False,
            verify=tls,
            trust_env=False,
            timeout=None,  # each request has one timeout, for all of it
            limits=httpx.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency),
        )
        self._free = asyncio.Semaphore(config.concurrency)
        self._last_good = time.clock()
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    def close(self) -> None:
        """Stop asking."""
        self._closed = True

    async def scores(self, samples: Sequence[Sample]) -> list[Score]:
        """The service's verdict on each sample.

        Raises ``GivenUp`` at the deadline, ``RunError`` for an answer that would be the same again, and ``NotAsked`` after ``close``.
        """
        body = request_body(samples)
        async with self._free:
            return await self._insist(body, len(samples))

    async def _insist(self, body: bytes, count: int) -> list[Score]:
        began, failures = self._time.clock(), 0
        last = f"not asked, because others failed, the last: {self._breaker.trouble}"
        while True:
            # A service that has been silent to everybody is not waited for once more by each.
            deadline = min(began, self._last_good) + self._config.deadline_seconds
            while wait := self._breaker.wait():
                await self._nap(wait, deadline, last)
            if self._closed:
                raise NotAsked
            try:
                scores = read_scores(await self._request(body, count), count)
            except (Garbled, _Trouble) as trouble:
                failures += 1
                last = f"{failures} {'request' if failures == 1 else 'requests'} in {self._time.clock() - began:.0f} s, the last: {trouble}"
                if self._breaker.failed(str(trouble)):
                    self._say(f"{self._config.url} failed {self._config.breaker_failures} times in a row, at last with {trouble}; waiting")
                asked = trouble.wait if isinstance(trouble, _Trouble) else 0.0
                await self._rest(max(backoff(failures, self._time.draw), asked), deadline, last)
            except WrongAnswer as wrong:
                self.close()  # here and now: the next batch is waiting for its turn
                raise RunError(f"the reward service {self._config.url} {wrong}") from wrong
            else:
                self._breaker.succeeded()
                self._last_good = self._time.clock()
                return scores

    async def _rest(self, seconds: float, deadline: float, last: str) -> None:
        end = self._time.clock() + seconds
        while (left := end - self._time.clock()) > 0.0:
            await self._nap(left, deadline, last)

    async def _nap(self, left: float, deadline: float, last: str) -> None:
        """Sleep a part of what is ``left`` to wait. Raises ``GivenUp`` where the wait would outlast the deadline, and ``NotAsked``."""
        if self._closed:
            raise NotAsked
        if self._time.clock() + left > deadline:
            raise GivenUp(last)
        await self._time.sleep(min(left, _NAP_SECONDS))

    async def _request(self, body: bytes, count: int) -> bytes:
        limit, found = count * BYTES_PER_SAMPLE, bytearray()
        try:
            async with (
                asyncio.timeout(self._config.timeout_seconds),
                self._http.stream("POST", self._config.url, content=body) as response,
            ):
                async for chunk in response.aiter_bytes():
                    found += chunk
                    if len(found) > limit:
                        break
        except TimeoutError as error:
            raise _Trouble(f"no answer within {self._config.timeout_seconds:g} s") from error
        except httpx.RequestError as error:
            raise _Trouble(f"{type(error).__name__}: {error}".rstrip(": ")) from error
        _check_status(response, bytes(found))
        if len(found) > limit:
            raise WrongAnswer(f"answered more than {limit} bytes for {count} samples")
        return bytes(found)


def _check_status(response: httpx.Response, body: bytes) -> None:
    status = response.status_code
    what = f"{status} {response.reason_phrase}".strip()
    if status in _PASSING or status >= 500:
        raise _Trouble(what, retry_after(response.headers.get("Retry-After"), datetime.now(UTC)))
    if response.is_redirect:
        place = shown(response.headers["Location"].encode())
        raise WrongAnswer(f"answered {what}, a redirect to {place}; redirects are not followed: put the final address into url")
    if not response.is_success:
        hint = "; is key_env set as it should be?" if status in (401, 403) else ""
        raise WrongAnswer(f"answered {what}: {shown(body)}{hint}")
