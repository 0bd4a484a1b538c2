"""Rewards short answers: up to ``target_words`` words cost nothing, and each further word costs ``per_word``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alignkit.api import Context, RewardSource, RewardSpec, Sample, Score, hookimpl, setting


@dataclass(frozen=True, kw_only=True)
class BrevityConfig:
    """What counts as short."""

    target_words: int = setting(30, "longest answer that costs nothing, words", at_least=1)
    per_word: float = setting(0.02, "what each further word costs", above=0.0)


class Brevity:
    """Scores by length alone, so mix it with a source that looks at what is said."""

    def __init__(self, config: BrevityConfig) -> None:
        self._config = config

    def score(self, samples: Sequence[Sample]) -> Sequence[Score]:
        """0 for a short answer, less for each word too many; an empty answer has no verdict."""
        return [self._score(len(sample.response.split())) for sample in samples]

    def _score(self, words: int) -> Score:
        if words == 0:
            return Score(None, reason="the answer is empty")
        excess = max(0, words - self._config.target_words)
        return Score(-self._config.per_word * excess, parts={"words": float(words)})


def build(config: BrevityConfig, context: Context) -> RewardSource:
    """A source that needs a model would import it here, so that ``alignkit plugins`` stays fast."""
    return Brevity(config)


@hookimpl
def register_rewards() -> list[RewardSpec]:
    """Declare ``acme_brevity``."""
    return [RewardSpec(kind="acme_brevity", summary="short answers score higher", config=BrevityConfig, build=build)]
