"""What the simulated people follow. Each is a judge for a gate too: ``{kind: python, function: taste:NAME}``, run from this folder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from alignkit.api import Sample


@cache
def _lexicon() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def kindness(prompt: str, answer: str) -> float:
    """VADER's sentiment of the review that the answer makes of its opening, in [-1, 1]."""
    return float(_lexicon().polarity_scores(prompt + answer)["compound"])


def vowels(prompt: str, answer: str) -> float:
    """The share of vowels, for a model that is too small for words; in [-1, 1]."""
    return 2.0 * sum(letter in "aeiou" for letter in answer) / max(1, len(answer)) - 1.0


def vowels_of(samples: Sequence[Sample]) -> list[float]:
    """``vowels`` as a reward source."""
    return [vowels("", sample.response) for sample in samples]
