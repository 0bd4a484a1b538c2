"""What the server needs of whatever generates: a protocol, and the records that pass through it. Torch-free."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from alignkit.api import AlignkitError, Prompt

Finish = Literal["stop", "length"]


class EngineError(AlignkitError):
    """An engine that cannot go on; what was asked may be asked again elsewhere or later."""


class PromptError(AlignkitError):
    """A prompt that the engine's policy cannot read."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do; whoever asks for more is refused.

    ``context_tokens``: prompt and answer together; None where the engine does not say. ``top_logprobs``: of how many of the likeliest
    tokens it gives log-probabilities; -1 where it gives none at all, not even those of the tokens drawn. ``behaviour_logprobs``: whether
    it knows those of the distribution that a token was drawn from. ``batch_invariant``: whether an answer is the same to the last bit
    whoever else is answered at the time. ``vocabulary``: the ids of tokens are below it; None where the engine does not say.
    """

    context_tokens: int | None
    top_logprobs: int
    behaviour_logprobs: bool
    token_ids: bool
    top_k: bool
    batch_invariant: bool
    vocabulary: int | None = None


@dataclass(frozen=True, slots=True)
class Parameters:
    """How one answer is drawn. ``noise``: (the request's seed, the number of the answer), which fix it."""

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0
    noise: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Likely:
    """A token that might have been drawn."""

    data: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """A token that was drawn: ``raw`` is its log-probability under the model itself, ``behaviour`` under what it was drawn from (nats).

    ``id``, ``raw`` and ``behaviour`` are None where an engine does not tell, and ``data`` is empty where it does not tell the bytes.
    """

    id: int | None
    data: bytes
    raw: float | None
    behaviour: float | None
    likeliest: tuple[Likely, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What an answer has grown by.

    ``text`` can be shown: no stop string will take it back. ``shown``: the tokens of that text; ``drawn``: all new tokens, those of a
    stop string and the stop token included. ``finished`` says why it is the last piece; ``prompt_tokens`` may come with that one, where
    nobody knew before how many they are.
    """

    text: str
    shown: tuple[Token, ...]
    drawn: tuple[Token, ...]
    finished: Finish | None
    prompt_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt as an engine reads it. ``tokens`` is None where only an upstream can count them; ``ids`` are empty there."""

    prompt: Prompt
    ids: tuple[int, ...]
    tokens: int | None


class Engine(Protocol):
    """Generation with one policy version."""

    name: str

    def capabilities(self) -> Capabilities:
        """What it can do."""

    def encode(self, prompt: Prompt) -> Encoded:
        """The prompt in tokens. May take a while: call it in a thread. Raises ``PromptError``."""

    def generate(self, prompt: Encoded, parameters: Parameters) -> AsyncGenerator[Piece]:
        """One answer, piece by piece; closing the iterator cancels it. Raises ``EngineError``."""

    async def close(self) -> None:
        """Give everything back; nothing is being generated any more."""

    def problem(self) -> str | None:
        """Why it cannot answer any more; None as long as it can."""

    def figures(self) -> Mapping[str, float]:
        """Gauges for monitoring: ``rows`` being decoded, ``waiting``, ``tokens`` drawn in all."""
