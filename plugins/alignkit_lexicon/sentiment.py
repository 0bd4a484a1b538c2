"""A reward that needs no model: the sentiment of a text by VADER's lexicon and rules (Hutto and Gilbert, ICWSM 2014)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from alignkit.api import RunError, Sample, Score, setting


@dataclass(frozen=True, kw_only=True)
class SentimentConfig:
    """What is read, and how large the reward is."""

    text: Literal["response", "conversation"] = setting(
        "response", "what is read: the response alone, or the prompt's last message followed by it"
    )
    scale: float = setting(1.0, "the compound score, which lies in [-1, 1], is multiplied by this")


class SentimentReward:
    """Scores a text by VADER's compound score. A response without words gets no score."""

    def __init__(self, config: SentimentConfig) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError as error:
            raise RunError(
                "kind lexicon_sentiment needs the package vaderSentiment, which is not installed; "
                'run: pip install "alignkit[lexicon]"  (or: pip install vaderSentiment)'
            ) from error
        self._analyzer: Any = SentimentIntensityAnalyzer()
        self._config = config

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One score a sample, in [-scale, scale]; ``parts`` are the shares of positive and negative words."""
        return [self._score(sample) for sample in samples]

    def _score(self, sample: Sample) -> Score:
        if not sample.response.strip():
            return Score(None, reason="the response is empty")
        found = self._analyzer.polarity_scores(read(sample, self._config.text))
        return Score(self._config.scale * found["compound"], parts={"positive_share": found["pos"], "negative_share": found["neg"]})


def read(sample: Sample, text: Literal["response", "conversation"]) -> str:
    """The text that is scored. A plain prompt runs on into its response; a message and its answer stand on two lines."""
    if text == "response":
        return sample.response
    asked = sample.prompt.messages[-1].content
    return asked + sample.response if sample.prompt.plain else f"{asked}\n{sample.response}"
