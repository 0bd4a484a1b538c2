"""A stranger's reward source that makes everything hard: it has running statistics, and draws from every global generator."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alignkit.api import Context, RewardSource, RewardSpec, Sample, Score, State, hookimpl


@dataclass(frozen=True, kw_only=True)
class MoodyConfig:
    """Nothing to choose."""


class Moody:
    """The length of a response against the mean of all lengths so far, a mood, and something of the prompt and its place in the batch; to
    some responses it has nothing to say.
    """

    def __init__(self) -> None:
        self.count, self.total = 0, 0.0

    def score(self, samples: Sequence[Sample]) -> Sequence[Score]:
        import torch

        return [self._score(place, sample, float(torch.rand(()))) for place, sample in enumerate(samples, start=1)]

    def _score(self, place: int, sample: Sample, drawn: float) -> Score:
        length = float(len(sample.response))
        self.count, self.total = self.count + 1, self.total + length
        if zlib.crc32(sample.response.encode()) % 11 == 0:
            return Score(None, reason="not in the mood")
        order = place * (zlib.crc32(sample.prompt.id.encode()) % 1009) / 10_000
        return Score(0.1 * (length - self.total / self.count) + random.random() + np.random.random() + drawn + order)

    def state(self) -> State:
        return State(values={"count": self.count, "total": self.total})

    def load_state(self, state: State) -> None:
        self.count, self.total = state.values["count"], state.values["total"]


def build(config: MoodyConfig, context: Context) -> RewardSource:
    return Moody()


@hookimpl
def register_rewards() -> list[RewardSpec]:
    return [RewardSpec(kind="moody", summary="lengths and moods", config=MoodyConfig, build=build)]
