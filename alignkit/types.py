"""The records that pass between the parts: frozen, torch-free, and the same for every algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Metrics = Mapping[str, float]
"""Figures of one step, named ``area/name_unit``."""

Overlong = Literal["error", "drop", "truncate"]
"""What happens to a row with more tokens than the stage allows."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a response answers.

    A ``plain`` prompt is text to be continued: its one message is encoded as it stands, without a chat template.
    ``metadata`` holds the row's other columns (a reference answer, a topic) for reward sources that want them.
    ``origin`` is the place it was read from, such as ``data/prompts.jsonl:12``; the same prompt from elsewhere is the same prompt.
    """

    id: str
    messages: tuple[Message, ...]
    plain: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)
    origin: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt with one response. ``finished`` tells whether the response ended by a stop token rather than by its length limit."""

    prompt: Prompt
    response: str
    finished: bool = True
    index: int = 0

    @property
    def id(self) -> str:
        """The prompt's id and the sample's number among those of its prompt."""
        return f"{self.prompt.id}/{self.index}"

    @property
    def messages(self) -> tuple[Message, ...]:
        """The whole conversation, the response as its last turn."""
        return (*self.prompt.messages, Message("assistant", self.response))


@dataclass(frozen=True, slots=True)
class Score:
    """A reward source's verdict on one sample; higher is better.

    ``value`` None means that there is no verdict (``reason`` says why): the sample is masked and counted, it never becomes 0.
    ``parts`` are the figures the value was made of; they are logged under their names.
    """

    value: float | None
    parts: Mapping[str, float] = field(default_factory=dict)
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt with the completion that a person wrote. Assistant turns of ``completion`` are trained, nothing else is."""

    prompt: Prompt
    completion: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text to predict, word for word, as in pretraining."""

    id: str
    text: str
    origin: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Ranking:
    """2 to 9 responses to one prompt, ranked: 1 is best, equal numbers are ties. A comparison is a ranking of two.

    ``margin`` is how much better (in reward) each better response must at least be; ``preference`` is the probability,
    for two responses, that the first is the better one (a soft label).
    """

    prompt: Prompt
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    labeler: str | None = None
    weight: float = 1.0
    margin: float = 0.0
    preference: float | None = None


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One encoded sequence. ``loss_mask`` is True at the tokens that are trained or scored: a response's, its stop token included."""

    id: str
    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class RankedRows:
    """A ranking, encoded: one row a response, to be kept together through every split into microbatches."""

    id: str
    rows: tuple[TokenRow, ...]
    ranks: tuple[int, ...]
    labeler: str | None = None
    weight: float = 1.0
    margin: float = 0.0
    preference: float | None = None


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt, encoded and ready to be continued."""

    prompt: Prompt
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How responses are drawn: softmax of logits / ``temperature``, no filters, at most ``max_new_tokens`` tokens."""

    max_new_tokens: int
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What an optimizer asks of its loop: ``steps`` updates, each on ``rows`` rows (prompts, when it learns from rollouts).

    ``samples_per_prompt`` and ``sampling`` are for optimizers fed with rollouts.
    """

    steps: int
    rows: int
    samples_per_prompt: int = 1
    sampling: Sampling | None = None
