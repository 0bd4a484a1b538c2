"""The reward source: batches asked side by side, answers passed on as they come, and a budget for those that do not."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from typing import TYPE_CHECKING

import httpx
from anyio.from_thread import start_blocking_portal

from alignkit.api import AlignkitError, Answer, RunError, Sample, Score, Unavailable
from alignkit_http_reward.client import Client, GivenUp, NotAsked, Time
from alignkit_http_reward.patience import Breaker

if TYPE_CHECKING:
    from alignkit_http_reward import HTTPConfig

WINDOW = 1000
"""The budget of failures is a share of this many samples."""


class HTTPReward:
    """Asks a service. A sample that it does not answer has no score; too many of those, and the run stops to be continued later."""

    def __init__(self, config: HTTPConfig, key: str | None, say: Callable[[str], None], time: Time | None = None) -> None:
        self._config, self._key, self._say, self._time = config, key, say, time or Time()
        self._tls = httpx.create_ssl_context()  # once: reading the certificates takes longer than a request
        self._breaker = Breaker(config.breaker_failures, config.cooldown_seconds, self._time.clock)
        self._failed: deque[bool] = deque(maxlen=WINDOW)

    def score(self, samples: Sequence[Sample]) -> Sequence[Score]:
        """One score a sample, in the same order. Raises what ``answers`` raises."""
        found = {answer.index: answer.score for batch in self.answers(samples) for answer in batch}
        return [found[i] for i in range(len(samples))]

    def answers(self, samples: Sequence[Sample]) -> Iterator[Sequence[Answer]]:
        """A batch's answers as soon as they are there.

        Raises ``RunError`` for an answer that cannot be used and ``Unavailable`` when too few come; those on their way are passed on first.
        """
        size = self._config.batch
        batches = [range(start, min(start + size, len(samples))) for start in range(0, len(samples), size)]
        allowed = self._config.max_failed_share * min(WINDOW, len(self._failed) + len(samples))
        silent = 0
        problem: AlignkitError | None = None
        client = Client(self._config, self._key, self._tls, self._breaker, self._time, self._say)
        # A loop in a thread of its own: in a notebook this thread has one already. Whatever leaves the block early cancels all requests.
        with start_blocking_portal() as portal, portal.wrap_async_context_manager(client):
            asked = {portal.start_task_soon(client.scores, [samples[i] for i in batch]): batch for batch in batches}
            for future in as_completed(asked):
                batch = asked[future]
                try:
                    scores = future.result()
                except NotAsked:
                    continue  # The client was closed because of another batch; that one's problem is told.
                except GivenUp as silence:
                    silent += len(batch)
                    self._failed.extend([True] * len(batch))
                    self._say(f"{self._config.url}: {len(batch)} samples have no score: {silence}")
                    yield [Answer(i, Score(None, reason=f"{self._config.url}: {silence}"), answered=False) for i in batch]
                    if sum(self._failed) > allowed or silent == len(samples):
                        problem = problem or self._unavailable(silence)
                        client.close()
                except RunError as error:
                    problem = problem or error
                    client.close()
                else:
                    self._failed.extend([False] * len(batch))
                    yield [Answer(i, score) for i, score in zip(batch, scores, strict=True)]
        if problem:
            raise problem

    def _unavailable(self, silence: GivenUp) -> Unavailable:
        return Unavailable(
            f"the reward service {self._config.url} left {sum(self._failed)} of the last {len(self._failed)} samples without a score "
            f"(max_failed_share: {self._config.max_failed_share:g}): {silence}. Look at the service; the same command continues the run"
        )


def key_of(variable: str | None) -> str | None:
    """The key in an environment variable. Raises ``RunError`` when it is not there, or cannot be sent; the key itself is never shown."""
    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key:
        raise RunError(f"key_env names the environment variable {variable}, which is not set; export it before the run starts")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise RunError(f"the key in the environment variable {variable} holds a blank, a line break or a letter beyond ASCII; set it anew")
    return key
