"""All that a plugin may touch while it works: one object, made by the runner for each stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.interfaces import DataSpec, Policy, RewardSource
from alignkit.settings import Component
from alignkit.types import Plan

if TYPE_CHECKING:
    from alignkit.models.scalar import ScalarModel
    from alignkit.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Context:
    """One stage's surroundings.

    ``seed``: the run's. ``folder``: the stage's own. ``artifact(stage)``: the folder of an earlier stage's policy or
    reward model; None is the run's own model.
    ``load_policy(stage, trainable)``: a policy; None is the run's own model. ``load_scalar(stage, trainable)``: the reward model that
    the stage made, or a new scalar head on the backbone of the policy that it made. ``start``: where this stage's policy starts.
    ``reference``: the stage of the frozen reference. ``plan``: what the loop obeys, None where there is no optimizer.
    ``rows``: what the loop will feed, encoded. ``checks``: whether what must always hold is checked (``alignkit.checks``).
    ``say(text)``: a line for the person watching.
    """

    seed: int
    folder: Path
    registry: Registry
    start: str | None
    reference: str | None
    plan: Plan | None
    rows: Sequence[Any]
    checks: bool
    artifact: Callable[[str | None], Path]
    load_policy: Callable[[str | None, bool], Policy]
    load_scalar: Callable[[str | None, bool], ScalarModel]
    say: Callable[[str], None]

    def build_reward(self, component: Component[RewardSource]) -> RewardSource:
        """The reward source that a config names, such as one part of a mix."""
        return self.registry.reward(component.kind).build(component.config, self)

    def build_data(self, component: Component[Any]) -> Any:
        """The data source that a config names, such as an evaluator's prompts."""
        spec: DataSpec = self.registry.data(component.kind)
        return spec.build(component.config)
