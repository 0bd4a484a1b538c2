"""What is watched while a policy learns from rollouts: signs that it exploits the reward. Each is warned of once a stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev

from alignkit.guards.guard import Guard
from alignkit.guards.holdout import Holdout
from alignkit.guards.signals import duplicate_share, is_repetitive, spearman
from alignkit.interfaces import OnlineOptimizer, ScoredRollout, State
from alignkit.types import Metrics

WINDOW = 512
"""Responses over which length and reward are compared."""

_START = 3
"""Iterations whose mean is where a run started."""

_RECENT = 64
"""Responses whose rewards are looked at for whether they differ at all."""

_ENOUGH = 32
"""Fewer rewards than this say nothing."""

_FEW = 8
"""Fewer responses in an iteration than this say nothing of it."""

Figures = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Sign:
    """One sign: when it shows, which figure shows it, and what it may mean."""

    what: str
    figure: str
    shows: Callable[[Figures], bool]
    means: str


SIGNS = (
    Sign(
        "length",
        "guard/length_correlation",
        lambda f: f["guard/length_correlation"] > 0.6 and f["guard/length_ratio"] > 1.5,
        "the longer a response, the higher its reward, and responses have grown by half: the reward may be measuring length; look at the "
        "longest samples, and take length out of the reward",
    ),
    Sign(
        "repetition",
        "guard/repetitive_share",
        lambda f: f["guard/repetitive_share"] > 0.2,
        "more than a fifth of the responses repeat themselves: the reward may count what is said twice; look at samples, raise kl.coef",
    ),
    Sign(
        "duplicates",
        "guard/duplicate_share",
        lambda f: f["guard/duplicate_share"] > 0.2,
        "more than a fifth of the responses are also given to other prompts: the policy may have found one answer that always pays",
    ),
    Sign(
        "cut off",
        "guard/cut_share",
        lambda f: f["guard/cut_share"] > 0.5 and f["guard/cut_share"] > f["guard/cut_share_start"] + 0.25,
        "more than half of the responses end at their length limit, far more than at the start: the policy may be unlearning to stop; set "
        "missing_eos_penalty, or look at what the reward makes of length",
    ),
    Sign(
        "entropy",
        "guard/entropy_ratio",
        lambda f: f.get("guard/entropy_ratio", 1.0) < 0.1,
        "the policy's entropy is less than a tenth of what it was: it has all but stopped trying other things; lower learning_rate, raise "
        "kl.coef or entropy_coef",
    ),
    Sign(
        "flat reward",
        "guard/reward_std",
        lambda f: f.get("guard/reward_std", 1.0) < 1e-4,
        "all responses have the same reward, so there is nothing to learn from it; look at what the reward source returns",
    ),
)
"""In the order in which they are told. A figure that cannot be had shows nothing."""


class Watch:
    """An optimizer that is watched: it learns as it would alone, and its metrics have ``guard/...`` figures besides.

    ``holdout``: the second opinion, where the config has one.
    """

    def __init__(self, optimizer: OnlineOptimizer, guard: Guard, holdout: Holdout | None) -> None:
        self._optimizer, self._guard, self._holdout = optimizer, guard, holdout
        self._iteration = 0
        self._window: list[tuple[float, float]] = []
        self._start: dict[str, list[float]] = {}
        self._warned: list[str] = []

    def update(self, batch: ScoredRollout) -> Metrics:
        """The optimizer's update, then a look at what it was fed with."""
        metrics = self._optimizer.update(batch)
        self._iteration += 1
        figures = self._figures(batch, metrics)
        if len(batch.scores) >= _FEW:
            for sign in SIGNS:
                if sign.what not in self._warned and sign.shows(figures):
                    self._warn(sign.what, f"{sign.figure} {figures[sign.figure]:.3g}: {sign.means}", figures[sign.figure])
        if self._holdout:
            figures |= self._second_opinion(self._holdout, batch)
        return {**metrics, **figures}

    def _figures(self, batch: ScoredRollout, metrics: Metrics) -> dict[str, float]:
        rollout = batch.rollout
        tokens = [ids[mask].tolist() for ids, mask in zip(rollout.batch.ids, rollout.batch.loss_mask, strict=True)]
        scored = [(float(len(row)), value) for row, value in zip(tokens, _values(batch), strict=True) if value is not None]
        self._window = [*self._window, *scored][-WINDOW:]
        enough = len(self._window) >= _ENOUGH
        length, cut = fmean(map(len, tokens)), fmean(not sample.finished for sample in rollout.samples)
        figures = {
            "guard/length_correlation": spearman(*zip(*self._window, strict=True)) if enough else 0.0,
            "guard/length_ratio": length / max(self._started("length", length), 1.0),
            "guard/repetitive_share": fmean(map(is_repetitive, tokens)),
            "guard/duplicate_share": duplicate_share([s.prompt.id for s in rollout.samples], [tuple(row) for row in tokens]),
            "guard/cut_share": cut,
            "guard/cut_share_start": self._started("cut", cut),
        }
        if enough:
            figures["guard/reward_std"] = pstdev(value for _, value in self._window[-_RECENT:])
        entropy = metrics.get("policy/entropy_nats", math.nan)
        if math.isfinite(entropy) and (before := self._started("entropy", entropy)) > 0:
            figures["guard/entropy_ratio"] = entropy / before
        return figures

    def _started(self, name: str, value: float) -> float:
        """The mean of the first values, of which ``value`` is one until there are enough."""
        first = self._start.setdefault(name, [])
        if len(first) < _START:
            first.append(value)
        return fmean(first)

    def _second_opinion(self, holdout: Holdout, batch: ScoredRollout) -> dict[str, float]:
        holdout.note([value for value in _values(batch) if value is not None])
        if self._iteration % holdout.every:
            return {}
        judged = holdout.look()
        if (gap := holdout.gap()) and "proxy gap" not in self._warned:
            self._warn("proxy gap", gap, judged)
            if holdout.stop:
                self._guard.stop(gap)
        return {"guard/judge_mean": judged}

    def _warn(self, what: str, text: str, figure: float) -> None:
        self._warned.append(what)
        self._guard.tell(what, f"warning after step {self._iteration}: {text}", figure=figure)

    def save(self, folder: Path) -> None:
        """Write what the optimizer has learnt."""
        self._optimizer.save(folder)

    def state(self) -> State:
        """What was seen so far."""
        return State(
            values={
                "iteration": self._iteration,
                "window": [list(pair) for pair in self._window],
                "start": self._start,
                "warned": self._warned,
                "holdout": dict(self._holdout.state().values) if self._holdout else None,
            }
        )

    def load_state(self, state: State) -> None:
        """Continue from ``state``."""
        self._iteration, self._warned = state.values["iteration"], list(state.values["warned"])
        self._window = [(length, reward) for length, reward in state.values["window"]]
        self._start = {name: list(values) for name, values in state.values["start"].items()}
        if self._holdout and state.values["holdout"]:
            self._holdout.load_state(State(values=state.values["holdout"]))


def _values(batch: ScoredRollout) -> Sequence[float | None]:
    """The rewards; None where there is none, or none that is a number."""
    return [score.value if score.value is not None and math.isfinite(score.value) else None for score in batch.scores]
