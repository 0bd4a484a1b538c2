"""What the rules read and what they make, as plain records: no database, no HTTP, no tensors."""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal

from alignkit_serve.dataset.filters import Form

Message = Mapping[str, str]
Text = str | list[dict[str, str]]
"""A prompt or an answer as data formats have it: plain text, or a conversation."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked: an inference without its answers."""

    inference_id: str
    messages: Sequence[Message]
    prompt_sha256: str
    policy_id: str

    @property
    def form(self) -> Form:
        """Whether it is a conversation to be answered, or text to be continued."""
        return "text" if any(message["role"] == "prompt" for message in self.messages) else "chat"


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion, and what it answers. ``key``: the same for the same text under the same prompt, whichever completion it is."""

    id: str
    text: str
    policy_id: str
    asked: Asked
    key: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", answer_key(self.asked.prompt_sha256, self.text))


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """Feedback that is in force. ``weight``: what the store says of its annotator; ``better``: which end of a metric is the better one."""

    id: str
    kind: str
    target_type: Literal["completion", "inference", "episode", "group"]
    target_id: str
    annotator_id: str
    api_key_id: str | None
    value: Any
    occurred_at: datetime
    inference_id: str | None = None
    dwell_ms: int | None = None
    weight: float = 1.0
    status: Literal["active", "probation", "blocked"] = "active"
    metric: str | None = None
    better: Literal["max", "min"] | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that an export is made of: judgements, and by id the questions, the answers, and which answers belong together."""

    judgements: tuple[Judgement, ...]
    asked: Mapping[str, Asked]
    answers: Mapping[str, Answer]
    candidates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The completions of an inference, and of a group that is of no single inference."""

    def prompt_of(self, judgement: Judgement) -> Asked | None:
        """What the answers that a judgement is about were asked, if that may be used."""
        if judgement.inference_id is not None:
            return self.asked.get(judgement.inference_id)
        found = (self.answers.get(id) for id in sorted(self.candidates.get(judgement.target_id, ())))
        return next((answer.asked for answer in found if answer), None)

    def ids(self, judgement: Judgement) -> tuple[str, ...]:
        """The completions that a judgement about a completion, or about an inference, is about."""
        return (judgement.target_id,) if judgement.target_type == "completion" else self.candidates.get(judgement.target_id, ())

    def judged(self, judgement: Judgement) -> tuple[Answer, ...]:
        """Those of them that may be used."""
        return tuple(answer for id in self.ids(judgement) if (answer := self.answers.get(id)))

    def sole(self, judgement: Judgement) -> Answer | None:
        """The one answer that a judgement is about; None where it may be about another as well, or that one may not be used."""
        return self.answers.get(self.ids(judgement)[0]) if len(self.ids(judgement)) == 1 else None

    def of_form(self, form: Form) -> Evidence:
        """What is said of prompts of one form: a column holds conversations or plain text, and not both."""
        asked = {id: one for id, one in self.asked.items() if one.form == form}
        answers = {id: one for id, one in self.answers.items() if one.asked.form == form}
        return replace(self, asked=asked, answers=answers)


@dataclass(frozen=True, slots=True)
class Made:
    """A row of an export: its ``values`` without what tells where it is from, which are the other fields.

    ``digest``: by which equal rows are found, and rows are ordered; that of the values, however their letters are composed.
    """

    values: Mapping[str, Any]
    digest: str
    prompt_sha256: str
    weight: float
    origin: str
    feedback: frozenset[str]
    annotators: frozenset[str]
    keys: frozenset[str | None]
    policies: frozenset[str]
    inferences: frozenset[str]


@dataclass(frozen=True, slots=True)
class Dispute:
    """What annotators who count do not agree on: the feedback on either side, for people to settle."""

    prompt_sha256: str
    one_side: tuple[str, ...]
    other_side: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Rows, why each judgement that is in none of them is not, and what annotators do not agree on."""

    rows: tuple[Made, ...]
    dropped: Mapping[str, str]
    disputes: tuple[Dispute, ...] = ()


def made(
    values: Mapping[str, Any],
    judgements: Sequence[Judgement],
    asked: Sequence[Asked],
    *,
    weight: float,
    origin: str,
    policies: Sequence[str] = (),
) -> Made:
    """A row of what one or more judgements say."""
    return Made(
        values=values,
        digest=digest(values),
        prompt_sha256=asked[0].prompt_sha256,
        weight=weight,
        origin=origin,
        feedback=frozenset(one.id for one in judgements),
        annotators=frozenset(one.annotator_id for one in judgements),
        keys=frozenset(one.api_key_id for one in judgements),
        policies=frozenset(policies),
        inferences=frozenset(one.inference_id for one in asked),
    )


def merged(rows: Sequence[Made]) -> Made:
    """What several say alike as one row, with their weights added up."""
    rows = sorted(rows, key=lambda row: sorted(row.feedback))
    return replace(
        rows[0],
        weight=math.fsum(row.weight for row in rows),
        origin=",".join(sorted({row.origin for row in rows})),
        feedback=frozenset().union(*(row.feedback for row in rows)),
        annotators=frozenset().union(*(row.annotators for row in rows)),
        keys=frozenset().union(*(row.keys for row in rows)),
        policies=frozenset().union(*(row.policies for row in rows)),
        inferences=frozenset().union(*(row.inferences for row in rows)),
    )


def digest(values: Mapping[str, Any]) -> str:
    """sha256 of a row's values, normalised."""
    return hashlib.sha256(normal(json.dumps(values, sort_keys=True, ensure_ascii=False)).encode()).hexdigest()


def normal(text: str) -> str:
    """Text with its letters composed in one way (NFC), so that what looks the same is the same."""
    return unicodedata.normalize("NFC", text)


def answer_key(prompt_sha256: str, text: str) -> str:
    """The hash of a text as an answer to a prompt."""
    return hashlib.sha256(f"{prompt_sha256} {normal(text)}".encode()).hexdigest()


def as_prompt(asked: Asked) -> Text:
    """The prompt as data formats have it."""
    if asked.form == "text":
        return "".join(message["content"] for message in asked.messages)
    return [{"role": message["role"], "content": message["content"]} for message in asked.messages]


def as_answer(prompt: Text, text: str) -> Text:
    """An answer in the form of the prompt that it answers."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def unusable(asked: Asked) -> str | None:
    """Why a prompt can be in no row; None: it can."""
    turns = asked.messages
    if asked.form == "text":
        return None if as_prompt(asked) else "no_question"
    if not turns or turns[-1]["role"] == "assistant":
        return "no_question"
    if any(message["role"] == "assistant" and not message["content"].strip() for message in turns):
        return "empty_turn"
    return None
