"""The guard of one stage: counts what was skipped, sends the stage back once, ends it when something asks for it. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from alignkit.config.schema import GuardConfig
from alignkit.errors import RunError, Stopped
from alignkit.interfaces import State
from alignkit.tracking import EventLog

_WINDOW = 100
"""Steps over which a share of skipped steps is taken."""

_COOLING = 0.5
"""What a stage that is sent back has its learning rates multiplied by."""

_SHOWN = 8
"""Rows that a message names."""


class RollBack(Exception):
    """The stage goes back to before ``first``, the first step that had to be skipped; the rows up to step ``last`` are not fed again."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.first, self.last = first, last


class Guard:
    """What one stage has been through. Part of its checkpoints.

    ``rate``: what every learning rate of the stage is multiplied by. ``settings``: whatever a user may change to repair the stage; while
    they are the same, a stage that was stopped stays so.
    """

    def __init__(self, stage: str, config: GuardConfig, settings: str, say: Callable[[str], None], events: EventLog) -> None:
        self.config = config
        self.rate = 1.0
        self._stage, self._settings, self._say, self._events = stage, settings, say, events
        self._step = 0
        self._skipped: list[int] = []
        self._returned = False
        self._stopped: str | None = None

    def begin(self, step: int) -> None:
        """What is told from now on happens in ``step``."""
        self._step = step

    def tell(self, what: str, text: str, **figures: Any) -> None:
        """Say what happened, and note it for the report. ``what`` names the guard."""
        self._say(f"{self._stage}: {text}")
        self._events.append("guard", stage=self._stage, step=self._step, what=what, text=text, **figures)

    def stop(self, text: str) -> None:
        """Ask for the stage to end after this step, saved; ``text`` says why, and what to look at."""
        self._stopped = text

    @property
    def stopped(self) -> str | None:
        """Why the stage has to end."""
        return self._stopped

    def settle(self, skips: float, rows: Sequence[str]) -> None:
        """Count the step that was just done, of ``rows``, in which so many ``skips`` of an optimizer step happened.

        Raises ``RollBack`` when it is too often, and ``RunError`` when it is so once more.
        """
        if not skips:
            return
        named = _named(rows)
        self._skipped = [*(step for step in self._skipped if step > self._step - _WINDOW), self._step]
        self.tell("skipped step", f"step {self._step} taught nothing: a loss or gradient of it was not finite ({named})", rows=list(rows))
        row = self._row()
        if len(row) >= self.config.skips:
            self.go_back(row[0], f"a loss or gradient of {len(row)} steps in a row was not finite", named)
        if len(self._skipped) > self.config.skipped_share * _WINDOW:
            self.go_back(self._skipped[0], f"a loss or gradient of {len(self._skipped)} of the last {_WINDOW} steps was not finite", named)

    def go_back(self, first: int, why: str, named: str) -> None:
        """Raise ``RollBack``, or ``RunError`` if the stage has been sent back before."""
        if self._returned:
            raise RunError(
                f"stage {self._stage}, step {self._step}: {why}, also after going back and with half the learning rate. Look at the last "
                f"rows ({named}), at learning_rate and warmup, at the scale of the rewards, and at precision (float32 overflows last)"
            )
        self.tell("rolled back", f"{why}; going back to before step {first}, with {_COOLING:g} times the learning rate and other rows")
        raise RollBack(first, self._step)

    def returned(self) -> None:
        """The stage was sent back: from here on it learns more slowly, and is not sent back again."""
        self.rate *= _COOLING
        self._returned, self._skipped = True, []

    def anchors(self) -> list[int]:
        """A checkpoint from before each of these steps may be needed."""
        recent = [step for step in self._skipped if step > self._step - _WINDOW]
        return [] if self._returned or not recent else [recent[0], self._row()[0]]

    def _row(self) -> list[int]:
        """The last skipped steps, as far as they have no other between them."""
        row = self._skipped[-1:]
        for step in reversed(self._skipped[:-1]):
            if step != row[0] - 1:
                break
            row.insert(0, step)
        return row

    def state(self) -> State:
        """All that it knows."""
        stopped = None if self._stopped is None else {"text": self._stopped, "settings": self._settings}
        return State(values={"rate": self.rate, "skipped": self._skipped, "returned": self._returned, "stopped": stopped})

    def load_state(self, state: State) -> None:
        """Continue from ``state``. Raises ``Stopped`` again where the stage was stopped and nothing was changed."""
        self.rate, self._returned = state.values["rate"], state.values["returned"]
        self._skipped = list(state.values["skipped"])
        stopped = state.values["stopped"]
        if stopped and stopped["settings"] == self._settings:
            raise Stopped(f"stage {self._stage} was stopped: {stopped['text']}. Change it and go on with --accept-changes")


def _named(rows: Sequence[str]) -> str:
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return f"rows {', '.join(rows[:_SHOWN])}{more}"
