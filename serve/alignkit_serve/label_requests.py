"""What makes label tasks, as it is sent. What is not known is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from alignkit_serve.judgements import Id, Words
from alignkit_serve.schemas import Text
from alignkit_serve.store.pool import Wanted

Place = Annotated[int, Field(ge=0, le=8)]
Gold = Annotated[list[Annotated[list[Place | Id], Field(min_length=1, max_length=9)]], Field(min_length=1, max_length=9)]
"""The right ranking, from the best to the worst: ids, or places from 0; those in one list are equally good."""


class _Wanted(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    overlap: Annotated[int, Field(ge=1, le=100)] = Field(1, description="how many people rank it")
    priority: Annotated[int, Field(ge=-1000, le=1000)] = Field(0, description="larger ones are given out first")

    def wanted(self) -> Wanted:
        """For the store."""
        return Wanted(self.overlap, self.priority)


class _Golden(_Wanted):
    gold: Gold | None = Field(None, description="the right ranking, where it is known: tells how far to trust whom")

    def wanted(self) -> Wanted:
        """For the store."""
        return Wanted(self.overlap, self.priority, self.gold)


class NewTask(_Golden):
    """``POST /v1/label/tasks``: completions of one prompt, or a group that there is."""

    completion_ids: Annotated[list[Id], Field(min_length=2, max_length=9)] | None = None
    group_id: Id | None = None
    tag: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = Field(
        None, description="your name for the task, under which it is made once"
    )

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if (self.completion_ids is None) == (self.group_id is None):
            raise ValueError("either completion_ids or group_id says what is ranked")
        if self.tag is not None and self.group_id is not None:
            raise ValueError("a group has one task, and needs no tag; leave it out")
        if self.completion_ids is not None and len(set(self.completion_ids)) < len(self.completion_ids):
            raise ValueError("a completion is named twice in completion_ids")
        return self


class Turn(BaseModel):
    """One turn of a conversation from elsewhere."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "user", "assistant", "tool"]
    content: Text


class ImportTask(_Golden):
    """``POST /v1/label/tasks:import``: answers that this server did not give. A ``prompt`` is a text that they continue."""

    prompt: Words | None = None
    messages: Annotated[list[Turn], Field(min_length=1, max_length=4096)] | None = None
    responses: Annotated[list[Words], Field(min_length=2, max_length=9)]

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("either prompt or messages says what is answered")
        if self.messages and self.messages[-1].role == "assistant":
            raise ValueError("messages ends with a turn of the assistant's; the answers are in responses")
        if len(set(self.responses)) < len(self.responses):
            raise ValueError("two of the responses are the same; nobody could rank them")
        return self

    def stored(self) -> list[dict[str, str]]:
        """The prompt's messages, as those of an inference are stored."""
        turns: Sequence[Turn] = self.messages or ()
        return [{"role": "prompt", "content": self.prompt}] if self.prompt is not None else [turn.model_dump() for turn in turns]


class Collect(_Wanted):
    """``POST /v1/label/tasks:collect``: tasks of what traffic left to be compared."""

    origins: Annotated[list[Literal["ab", "shadow", "n"]], Field(min_length=1, max_length=3)]
    limit: Annotated[int, Field(ge=1, le=1000)] = 100
