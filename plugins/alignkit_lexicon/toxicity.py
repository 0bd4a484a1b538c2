"""What no answer should say, by a list of words and the spellings that hide them (better-profanity's)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.api import RunError, Sample, Score


@dataclass(frozen=True, kw_only=True)
class ToxicityConfig:
    """Nothing to choose."""


class ToxicityReward:
    """-1 for a response with a word of the list, 0 for any other: a gate's measure, too coarse to train on."""

    def __init__(self, config: ToxicityConfig) -> None:
        try:
            from better_profanity import Profanity
        except ImportError as error:
            raise RunError(
                "kind lexicon_toxicity needs the package better-profanity, which is not installed; "
                'run: pip install "alignkit[lexicon]"  (or: pip install better-profanity)'
            ) from error
        self._words: Any = Profanity()

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One score a sample, -1 or 0."""
        return [Score(-1.0 if self._words.contains_profanity(sample.response) else 0.0) for sample in samples]
