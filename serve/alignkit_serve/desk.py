"""Where feedback is handed in: what comes while one transaction is on its way to the disk goes into the next one, all of it at once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from prometheus_client import CollectorRegistry, Counter

from alignkit_serve.admission import Meter
from alignkit_serve.errors import ApiError, busy
from alignkit_serve.scribe import Scribe
from alignkit_serve.store import StoreUnavailable
from alignkit_serve.store.feedback import Accepted, Opinion, Outcome, Refused

AT_ONCE = 1000
"""Opinions in one transaction; one who sends many does not keep the others waiting for longer than that takes."""

_STATUS = {
    "not_found": 404,
    "not_stored": 409,
    "invalid_value": 400,
    "idempotency_conflict": 409,
    "superseded": 409,
    "annotator_blocked": 403,
}


@dataclass(frozen=True, slots=True)
class _Handed:
    opinions: Sequence[Opinion]
    outcomes: asyncio.Future[list[Outcome]]


class Desk:
    """All of it is of the event loop, and needs no lock."""

    def __init__(self, scribe: Scribe, figures: CollectorRegistry, *, per_target_rpm: int) -> None:
        self._scribe = scribe
        self._per_target_rpm = per_target_rpm
        self._targets = Meter()
        self._waiting: list[_Handed] = []
        self._task: asyncio.Task[None] | None = None
        counted = Counter("alignkit_feedback", "feedback by kind and by what became of it", ["kind", "outcome"], registry=figures)
        self._counted = cache(counted.labels)

    async def add(self, opinions: Sequence[Opinion]) -> list[Outcome]:
        """What became of each, once all that was accepted is on the disk. Raises ``StoreUnavailable``."""
        handed = _Handed(opinions, asyncio.get_running_loop().create_future())
        self._waiting.append(handed)
        if self._task is None:
            self._task = asyncio.create_task(self._write())
        outcomes = await handed.outcomes
        for opinion, outcome in zip(opinions, outcomes, strict=True):
            self.count(opinion.kind, outcome)
        return outcomes

    def meter(self, target_id: str) -> None:
        """Take one opinion from what may be said of a target in a minute. Raises ``ApiError`` 429 when nothing is left."""
        seconds = self._targets.take(target_id, self._per_target_rpm)
        if seconds:
            raise busy("rate_limited", f"feedback on one target is taken {self._per_target_rpm} times a minute", seconds)

    def count(self, kind: str, outcome: Outcome | None) -> None:
        """For the figures; None: it was refused before anyone looked."""
        became = ("accepted" if outcome.new else "repeated") if isinstance(outcome, Accepted) else "refused"
        self._counted(kind, became).inc()

    async def _write(self) -> None:
        try:
            while self._waiting:
                taken, count = 1, len(self._waiting[0].opinions)
                while taken < len(self._waiting) and (count := count + len(self._waiting[taken].opinions)) <= AT_ONCE:
                    taken += 1
                group, self._waiting = self._waiting[:taken], self._waiting[taken:]
                await self._write_group(group)
        finally:
            self._task = None

    async def _write_group(self, group: Sequence[_Handed]) -> None:
        opinions = [opinion for handed in group for opinion in handed.opinions]
        try:
            outcomes = await self._scribe.add(opinions)
        # Nothing is kept back: whoever handed something in waits for this, and is given the very exception.
        except Exception as error:
            if isinstance(error, StoreUnavailable) or len(group) == 1:
                for handed in group:
                    if not handed.outcomes.done():
                        handed.outcomes.set_exception(error)
            else:
                # One of them cannot be stored, by a mistake of the server's; the others are not to suffer for it.
                for handed in group:
                    await self._write_group([handed])
            return
        for handed in group:
            own, outcomes = outcomes[: len(handed.opinions)], outcomes[len(handed.opinions) :]
            if not handed.outcomes.done():  # It is, where the client has gone.
                handed.outcomes.set_result(own)


def refusal(refused: Refused) -> ApiError:
    """What a client is told."""
    return ApiError(_STATUS[refused.code], refused.code, refused.message, param=refused.param)
