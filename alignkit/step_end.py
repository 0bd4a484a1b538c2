"""What follows each step of a stage that learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.config.schema import StageConfig
from alignkit.errors import Stopped
from alignkit.feed import Feed
from alignkit.interfaces import Tracker
from alignkit.interrupt import StopRequest
from alignkit.journal import Journal
from alignkit.parts import Parts
from alignkit.saving import Saves
from alignkit.tracking import MetricsFile, StageProgress
from alignkit.types import Metrics, Plan, PromptRow


@dataclass(frozen=True, kw_only=True, slots=True)
class StepEnd:
    """Validation when it is due, the figures to everyone, and then what was asked for meanwhile: a stop, or a checkpoint."""

    stage: StageConfig
    plan: Plan
    feed: Feed
    parts: Parts
    journal: Journal
    saves: Saves
    metrics: MetricsFile
    trackers: Sequence[Tracker]
    progress: StageProgress
    stop: StopRequest

    def begin(self, step: int) -> None:
        """What is asked, and what is found, from now on belongs to ``step``."""
        self.journal.begin(step)
        self.parts.guard.begin(step)

    def __call__(self, step: int, metrics: Metrics) -> None:
        """Raises ``Stopped``, ``RollBack`` or ``RunError`` where the guard says so, and ``Interrupted`` after a signal."""
        self._log(step, {**metrics, **self._validated(step)})
        guard, done = self.parts.guard, f"saved after step {step} of {self.plan.steps}"
        guard.settle(metrics.get("guard/skipped_steps", 0.0), [_row_id(self.feed.rows[i]) for i in self.parts.order.last])
        if guard.stopped:
            self.saves.final(step)
            raise Stopped(f"stage {self.stage.name} is stopped and {done}: {guard.stopped}{self._best()}")
        if step == self.plan.steps:
            return  # the artifact follows
        self.begin(step + 1)
        if self.stop.signal:
            self.saves.final(step)
            self.stop.check(f"stage {self.stage.name} is {done}")
        elif self.saves.due():
            self.saves.attempt(step)

    def _validated(self, step: int) -> Metrics:
        every = self.stage.validate_every
        if step < self.plan.steps and not (every and step % every == 0):
            return {}
        parts = self.parts
        held_out = parts.optimizer.validate(self.feed.validation) if self.feed.validation else {}
        figures = {f"validation/{name.replace('/', '_')}": value for name, value in held_out.items()}
        return {**figures, **parts.selection.consider(step, held_out, parts.optimizer.save)} if parts.selection else figures

    def _log(self, step: int, metrics: Metrics) -> None:
        self.metrics.log(self.stage.name, step, metrics)
        for tracker in self.trackers:
            tracker.log(self.stage.name, step, metrics)
        self.progress.advance(step, metrics)

    def _best(self) -> str:
        selection = self.parts.selection
        return f"; the best weights so far are in {selection.best}" if selection and selection.best else ""


def _row_id(row: Any) -> str:
    return row.prompt.id if isinstance(row, PromptRow) else str(row.id)
