"""Prompts that nothing is trained on, answered with the same noise each time, and scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from alignkit.errors import RunError
from alignkit.interfaces import Policy, RewardSource
from alignkit.rollout import LocalEngine
from alignkit.types import Prompt, PromptRow, Sampling

if TYPE_CHECKING:
    from alignkit.guards.guard import Guard


class HeldOut:
    """``prompts``, and the ``judge`` of the answers. ``noise``: the step that chooses the noise; none that a training step uses."""

    def __init__(
        self, prompts: Sequence[Prompt], judge: RewardSource, sampling: Sampling, *, seed: int, noise: int, guard: Guard | None = None
    ) -> None:
        self._prompts, self._judge, self._sampling, self._noise = prompts, judge, sampling, noise
        self._engine = LocalEngine(seed, guard)

    def score(self, policy: Policy) -> tuple[float, int]:
        """The mean score of one answer to each prompt, and how many answers have no score, or none that is a number.

        Raises ``RunError`` when none has one.
        """
        rows = [PromptRow(prompt, policy.codec.prompt(prompt)) for prompt in self._prompts]
        rollout = self._engine.rollout(policy, rows, self._sampling, samples_per_prompt=1, step=self._noise)
        scores = self._judge.score(rollout.samples)
        values = [score.value for score in scores if score.value is not None and math.isfinite(score.value)]
        if not values:
            why = scores[0].reason or f"the score is {scores[0].value}"
            raise RunError(f"none of {len(scores)} responses to held-out prompts was scored; the first: {why}")
        return fmean(values), len(scores) - len(values)
