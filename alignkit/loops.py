"""The two loops. They have no options: an algorithm that needs another shape of loop writes its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from alignkit.data.order import Order
from alignkit.interfaces import Optimizer, Policy, RewardSource, RolloutEngine, ScoredRollout
from alignkit.types import Metrics, Plan, PromptRow

Row = TypeVar("Row")
After = Callable[[int, Metrics], None]
"""Called with the number of steps done and the step's metrics: it logs, validates, saves, and may raise ``Interrupted``."""


def offline(optimizer: Optimizer[Sequence[Row]], rows: Sequence[Row], order: Order, plan: Plan, *, first: int, after: After) -> None:
    """Learn from rows that are there already. ``first`` is the number of steps done before (0, or a checkpoint's)."""
    for step in range(first, plan.steps):
        started = time.monotonic()
        metrics = optimizer.update([rows[i] for i in order.take(plan.rows)])
        after(step + 1, {**metrics, "time/step_seconds": time.monotonic() - started})


def online(
    optimizer: Optimizer[ScoredRollout],
    policy: Policy,
    engine: RolloutEngine,
    reward: RewardSource,
    prompts: Sequence[PromptRow],
    order: Order,
    plan: Plan,
    *,
    first: int,
    after: After,
) -> None:
    """Learn from responses that the policy draws and the reward source scores."""
    assert plan.sampling is not None
    for step in range(first, plan.steps):
        started = time.monotonic()
        chosen = [prompts[i] for i in order.take(plan.rows)]
        rollout = engine.rollout(policy, chosen, plan.sampling, samples_per_prompt=plan.samples_per_prompt, step=step)
        drawn = time.monotonic()
        scores = tuple(reward.score(rollout.samples))
        scored = time.monotonic()
        metrics = optimizer.update(ScoredRollout(rollout, scores))
        times = {
            "rollout": drawn - started,
            "reward": scored - drawn,
            "update": time.monotonic() - scored,
            "step": time.monotonic() - started,
        }
        after(step + 1, {**metrics, **{f"time/{name}_seconds": seconds for name, seconds in times.items()}})
