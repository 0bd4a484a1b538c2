"""The mean of what a judge says of answers to held-out prompts, and what is left out of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from alignkit.errors import RunError
from alignkit.held_out import HeldOut
from alignkit.types import Message, Prompt, Sample, Sampling, Score
from tests.fakes import tiny_policy


class Told:
    """Says what it was told to say, and remembers what it was asked."""

    def __init__(self, *values: float | None) -> None:
        self.values = values
        self.asked: list[str] = []

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        self.asked = [sample.response for sample in samples]
        return [Score(value, reason="asleep" if value is None else None) for value in self.values]


def held_out(judge: Told) -> HeldOut:
    prompts = [Prompt(str(i), (Message("user", f"{i}?"),)) for i in range(4)]
    return HeldOut(prompts, judge, Sampling(max_new_tokens=6), seed=3, noise=-2)


def test_the_mean_is_of_what_has_a_number() -> None:
    assert held_out(Told(1.0, None, 2.0, math.nan)).score(tiny_policy()) == (1.5, 2)


def test_every_look_draws_with_the_same_noise() -> None:
    judge, policy = Told(1.0, 1.0, 1.0, 1.0), tiny_policy()
    asked = held_out(judge)
    asked.score(policy)
    first = judge.asked
    asked.score(policy)
    assert judge.asked == first
    assert len(set(first)) > 1


@pytest.mark.parametrize(("value", "why"), [(None, "asleep"), (math.nan, "the score is nan")])
def test_where_nothing_has_a_number_the_first_reason_is_given(value: float | None, why: str) -> None:
    with pytest.raises(RunError, match=f"none of 4 responses to held-out prompts was scored; the first: {why}"):
        held_out(Told(*[value] * 4)).score(tiny_policy())
