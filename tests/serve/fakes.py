"""An engine that says what it is told to, as slowly as it is told to, and remembers who let it finish."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from alignkit.api import Prompt
from alignkit_serve.engine import Capabilities, Encoded, EngineError, Parameters, Piece, Token
from alignkit_serve.roster import Load, Warm
from alignkit_serve.store.policies import PolicyVersion

CAN = Capabilities(context_tokens=1000, top_logprobs=20, behaviour_logprobs=True, token_ids=True, top_k=True, batch_invariant=True)


@dataclass
class ScriptedEngine:
    """Each answer is ``words``, one a token, each after ``pause`` seconds.

    ``fails_after``: so many words, then it breaks; ``failing``: the number of the answer that does (all of them).

    ``begun``, ``finished`` and ``cancelled`` count answers; ``hold`` keeps all of them from their first word until it is set.
    """

    words: tuple[str, ...] = ("Well", ", ", "yes", ".")
    pause: float = 0.0
    fails_after: int | None = None
    failing: int | None = None
    can: Capabilities = CAN
    name: str = "scripted"
    begun: int = 0
    finished: int = 0
    cancelled: int = 0
    closed: bool = False
    broken: str | None = None
    hold: asyncio.Event | None = None
    seen: list[Parameters] = field(default_factory=list)

    def capabilities(self) -> Capabilities:
        return self.can

    def encode(self, prompt: Prompt) -> Encoded:
        ids = tuple(range(sum(len(message.content.split()) for message in prompt.messages)))
        return Encoded(prompt, ids, len(ids))

    async def generate(self, prompt: Encoded, parameters: Parameters) -> AsyncGenerator[Piece]:
        self.begun += 1
        self.seen.append(parameters)
        complete = False
        try:
            if self.hold:
                await self.hold.wait()
            count = min(parameters.max_tokens or 1 << 30, len(self.words))
            for number, word in enumerate(itertools.islice(self.words, count), start=1):
                await asyncio.sleep(self.pause)
                fails = self.failing in (None, parameters.noise[1])
                if fails and self.fails_after is not None and number > self.fails_after:
                    raise EngineError("the engine has stopped: a cable is loose")
                token = Token(number, word.encode(), -0.5, -0.25)
                complete = number == count
                yield Piece(word, (token,), (token,), ("stop" if count == len(self.words) else "length") if complete else None)
        finally:
            self.finished += complete
            self.cancelled += not complete

    async def close(self) -> None:
        self.closed = True

    def problem(self) -> str | None:
        return self.broken

    def figures(self) -> Mapping[str, float]:
        return {"rows": self.begun - self.finished - self.cancelled}


def scripted(**engines: ScriptedEngine) -> Load:
    """Loads the engine whose name is the path's last part."""

    async def load(path: Path) -> Warm:
        version = PolicyVersion(
            id=f"id-{path.name}",
            name=f"{path.name}@1",
            base_model="scripted",
            path=str(path),
            template_sha256="",
            created_at=datetime.now(UTC),
        )
        return Warm(version, engines[path.name], {})

    return load
