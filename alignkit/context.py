"""All that a plugin may touch while it works: one object, made by the runner for each stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.interfaces import DataSource, DataSpec, Policy, RewardSource, Row
from alignkit.settings import Component
from alignkit.types import Plan

if TYPE_CHECKING:
    from alignkit.guards.guard import Guard
    from alignkit.journal import Journal
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
    ``journal``: where the answers of people and services are kept; ``build_reward`` sees to it.
    ``guard``: what a learner is given, and what is told of figures that are not finite; it can end the stage (``alignkit.guards``).
    ``say(text)``: a line for the person watching. ``read``: the sha256 of what was read through ``build_data``, filled as it is read.
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
    journal: Journal
    guard: Guard
    say: Callable[[str], None]
    read: dict[str, str] = field(default_factory=dict)

    def build_reward(self, component: Component[RewardSource]) -> RewardSource:
        """The reward source that a config names, such as one part of a mix."""
        spec = self.registry.reward(component.kind)
        source = spec.build(component.config, self)
        return self.journal.keep(source, f"{component.kind}: {component.config!r}") if spec.journal else source

    def build_data(self, component: Component[Any]) -> DataSource:
        """The data source that a config names, such as an evaluator's prompts."""
        spec: DataSpec = self.registry.data(component.kind)
        return _Hashed(spec.build(component.config), component.kind, self.read)


@dataclass(frozen=True, slots=True)
class _Hashed:
    """A data source of which it is remembered what it gave."""

    source: DataSource
    kind: str
    read: dict[str, str]

    def rows(self) -> Iterable[Row]:
        """The rows."""
        from alignkit.data.records import fingerprint

        rows = list(self.source.rows())
        self.read[f"{self.kind}_{len(self.read) + 1}_sha256"] = fingerprint(rows)
        return rows
