"""The second opinion: a judge that nothing is trained on scores answers to held-out prompts every few iterations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING

from alignkit.config.schema import WatchConfig
from alignkit.data.records import prompts as read_prompts
from alignkit.held_out import HeldOut
from alignkit.interfaces import Policy, RewardSource, State

if TYPE_CHECKING:
    from alignkit.context import Context

_NOISE_STEP = -3
"""The step that chooses the noise: none that a training step uses, nor a selection, nor a comparison."""

_FALLS = 3
"""So many looks in a row at which the judge thinks less of the policy make a gap, when the reward has risen meanwhile."""


class Holdout:
    """``every``: iterations between looks; ``stop``: whether a gap ends the stage."""

    def __init__(self, config: WatchConfig, judge: RewardSource, policy: Policy, context: Context) -> None:
        assert context.plan is not None
        assert context.plan.sampling is not None
        self.every, self.stop = config.every, config.stop
        asked = read_prompts(list(context.build_data(config.prompts).rows()))
        self._policy = policy
        self._held_out = HeldOut(asked, judge, context.plan.sampling, seed=context.seed, noise=_NOISE_STEP, guard=context.guard)
        self._rewards: list[float] = []
        self._looks: list[tuple[float, float]] = []

    def note(self, rewards: Sequence[float]) -> None:
        """What the trained reward gave in one iteration."""
        if rewards:
            self._rewards.append(fmean(rewards))

    def look(self) -> float:
        """The judge's mean score of the policy as it is now. Raises ``RunError`` when it has no verdict on any response."""
        judged, _ = self._held_out.score(self._policy)
        if self._rewards:
            self._looks.append((fmean(self._rewards), judged))
            self._rewards = []
        return judged

    def gap(self) -> str | None:
        """What to say when the reward has risen over the last looks and the judge has fallen at each; None when that is not so."""
        last = self._looks[-_FALLS - 1 :]
        falls = all(now < before for (_, before), (_, now) in pairwise(last))
        if len(last) <= _FALLS or not falls or last[-1][0] <= last[0][0]:
            return None
        (reward, judged), (reward_now, judged_now) = last[0], last[-1]
        return (
            f"the reward rose from {reward:.3g} to {reward_now:.3g} while the judge fell from {judged:.3g} to {judged_now:.3g}: what "
            "is trained on is no longer what is wanted; look at samples, take earlier weights (select), or raise kl.coef"
        )

    def state(self) -> State:
        """The looks so far, and the rewards since the last."""
        return State(values={"rewards": self._rewards, "looks": [list(pair) for pair in self._looks]})

    def load_state(self, state: State) -> None:
        """Continue from ``state``."""
        self._rewards = list(state.values["rewards"])
        self._looks = [(reward, judged) for reward, judged in state.values["looks"]]
