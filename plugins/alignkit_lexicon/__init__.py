"""Rewards that need no model: the sentiment of a text, and whether it is toxic, by lexicons."""

from __future__ import annotations

from alignkit.api import Context, RewardSource, RewardSpec, hookimpl
from alignkit_lexicon.sentiment import SentimentConfig, SentimentReward
from alignkit_lexicon.toxicity import ToxicityConfig, ToxicityReward


def _sentiment(config: SentimentConfig, context: Context) -> RewardSource:
    return SentimentReward(config)


def _toxicity(config: ToxicityConfig, context: Context) -> RewardSource:
    return ToxicityReward(config)


@hookimpl
def register_rewards() -> list[RewardSpec]:
    """``lexicon_sentiment`` and ``lexicon_toxicity``."""
    return [
        RewardSpec(
            kind="lexicon_sentiment",
            summary="sentiment by VADER's lexicon and rules: fast, no model, easily fooled",
            config=SentimentConfig,
            build=_sentiment,
        ),
        RewardSpec(
            kind="lexicon_toxicity",
            summary="-1 for a response with a word that none should hold, else 0",
            config=ToxicityConfig,
            build=_toxicity,
        ),
    ]
