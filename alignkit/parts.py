"""What one stage that learns is made of, as far as it changes while the stage runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from alignkit.config.schema import StageConfig
from alignkit.context import Context
from alignkit.data.order import Order
from alignkit.feed import Feed
from alignkit.generators import Generators
from alignkit.guards.guard import Guard
from alignkit.guards.holdout import Holdout
from alignkit.guards.watch import Watch
from alignkit.interfaces import Policy, RewardSource, Stateful
from alignkit.selection import Selection, by_loss, by_reward
from alignkit.world import Changes, Inputs


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """In the order in which a checkpoint is loaded: ``inputs`` may refuse it, and whatever is loaded may draw from the ``generators``.

    ``judge``: who scores candidates for ``selection``; ``opinion``: who is asked by ``watch``.
    """

    inputs: Inputs
    guard: Guard
    optimizer: Any
    order: Order
    reward: RewardSource | None
    selection: Selection | None
    judge: RewardSource | None
    opinion: RewardSource | None
    watch: Watch | None
    generators: Generators

    def stateful(self) -> dict[str, Stateful]:
        """Those that a checkpoint holds, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: part for name, part in found.items() if isinstance(part, Stateful)}


def build_parts(
    stage: StageConfig,
    optimizer: Any,
    context: Context,
    feed: Feed,
    changes: Changes,
    load: Callable[[Path], Policy],
    generators: Generators,
) -> Parts:
    """Everything around the optimizer that the stage's config asks for. ``load`` reads a policy that was saved."""
    reward = context.build_reward(stage.reward) if stage.reward else None
    judge = selection = opinion = holdout = None
    if stage.select:
        judge = context.build_reward(stage.select.reward) if stage.select.reward else None
        judged = by_reward(stage.select, context, judge, load) if judge else by_loss
        selection = Selection(context.folder / "candidates", judged)
    if stage.watch:
        opinion = context.build_reward(stage.watch.reward)
        holdout = Holdout(stage.watch, opinion, optimizer.policy, context)
    return Parts(
        # Made last: by now everything has been read.
        inputs=Inputs(stage.name, {**feed.hashes(), **context.read}, changes),
        guard=context.guard,
        optimizer=optimizer,
        order=Order(len(feed.rows), context.seed, stage.name),
        reward=reward,
        selection=selection,
        judge=judge,
        opinion=opinion,
        watch=Watch(optimizer, context.guard, holdout) if reward else None,
        generators=generators,
    )
