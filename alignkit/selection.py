"""Which of a stage's checkpoints becomes its artifact: the one that scores best when it is validated, not simply the last."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.checkpoint import save_artifact
from alignkit.config.schema import SelectConfig
from alignkit.data.records import prompts as read_prompts
from alignkit.errors import RunError
from alignkit.files import FileHash
from alignkit.held_out import HeldOut
from alignkit.interfaces import Policy, RewardSource, State
from alignkit.types import Metrics, Sampling

if TYPE_CHECKING:
    from alignkit.context import Context

_NOISE_STEP = -2
"""The step that chooses the noise: none that any training step uses, nor a comparison."""

Judge = Callable[[Path, Metrics], Metrics]
"""From a saved candidate and its validation figures to figures that include ``selection/score``, higher is better."""


class Selection:
    """The best candidate so far, kept in ``folder``, and the figures of all of them."""

    def __init__(self, folder: Path, judge: Judge) -> None:
        self._folder, self._judge = folder, judge
        self._candidates: list[dict[str, Any]] = []
        self._best: int | None = None

    def consider(self, step: int, validation: Metrics, write: Callable[[Path], None]) -> Metrics:
        """Save the weights after ``step`` as a candidate and judge them; the better of them and the best so far is kept."""
        candidate = self._path(step)
        save_artifact(candidate, write)
        figures = self._judge(candidate, validation)
        self._candidates.append({"step": step, **_finite({"score": figures["selection/score"], **validation})})
        before, self._best = self._best, self._best_of_those_here()
        for other in (before, step):
            if other is not None and other != self._best:
                shutil.rmtree(self._path(other), ignore_errors=True)
        return figures

    def _best_of_those_here(self) -> int | None:
        # A stage that was sent back, or goes on with changes, may not come to the candidate for which an earlier one was removed.
        here = [one for one in self._candidates if one["score"] is not None and self._path(one["step"]).is_dir()]
        best = max(here, key=lambda one: one["score"], default=None)  # the earliest of equals
        return best["step"] if best else None

    def take(self, target: Path) -> dict[str, FileHash]:
        """Make the best candidate the artifact; returns the hash of each file. Raises ``RunError`` when there is none."""
        if self._best is None:
            count = len(self._candidates)
            raise RunError(f"none of the {count} candidates of this stage has a score that is a number; look at learning_rate")
        chosen = self._path(self._best)
        if not chosen.is_dir():
            raise RunError(f"{chosen} is the best candidate of this stage, and it is gone; restore it, or start the run anew with --fresh")
        return save_artifact(target, lambda folder: _copy(chosen, folder))

    @property
    def best(self) -> Path | None:
        """Where the best candidate so far is."""
        return None if self._best is None else self._path(self._best)

    def report(self) -> dict[str, Any]:
        """For the manifest."""
        return {"chosen_step": self._best, "candidates": self._candidates}

    def state(self) -> State:
        """The figures so far. A candidate that beat the best after this was taken is made and judged again, and beats it again."""
        return State(values={"candidates": self._candidates, "best": self._best})

    def load_state(self, state: State) -> None:
        """Continue from ``state``."""
        self._candidates, self._best = list(state.values["candidates"]), state.values["best"]

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"


def by_loss(candidate: Path, validation: Metrics) -> Metrics:
    """The lower the validation loss, the better."""
    losses = [value for name, value in validation.items() if name.startswith("loss/")]
    if not losses:
        raise RunError(f"the validation figures are {', '.join(validation)}, and none of them is a loss/...; select by reward")
    return {"selection/score": -losses[0]}


def by_reward(config: SelectConfig, context: Context, reward: RewardSource, load: Callable[[Path], Policy]) -> Judge:
    """The higher the mean reward of responses to held-out prompts, the better (Ouyang et al. 2022, section 3.5 and appendix C.1).

    All candidates answer the same prompts with the same noise. ``load`` reads a candidate as it was saved.
    """
    assert config.prompts is not None
    asked = read_prompts(list(context.build_data(config.prompts).rows()))
    sampling = Sampling(max_new_tokens=config.max_new_tokens, temperature=config.temperature)
    held_out = HeldOut(asked, reward, sampling, seed=context.seed, noise=_NOISE_STEP, guard=context.guard)

    def judge(candidate: Path, validation: Metrics) -> Metrics:
        score, unscored = held_out.score(load(candidate))
        return {"selection/score": score, "selection/unscored_count": float(unscored)}

    return judge


def _finite(figures: Metrics) -> dict[str, float | None]:
    """Figures as JSON has them; one that is no number is None, and the best of nothing."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)
