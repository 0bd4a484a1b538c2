"""The checkpoints of one running stage: taken up at its start, written when they are due, and the disk is forgiven twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from alignkit.checkpoint import load_checkpoint, save_checkpoint
from alignkit.config.schema import CheckpointConfig
from alignkit.errors import CheckpointError, PoisonedError, SaveError
from alignkit.guards.finite import not_finite
from alignkit.guards.guard import Guard
from alignkit.interfaces import Stateful
from alignkit.tracking import EventLog, MetricsFile

_FAILURES = 3
"""So many periodic saves in a row may not fail: by then what a kill would cost is too much to go on."""


class Saves:
    """Of ``parts``, in ``folder``; a checkpoint stands for the steps whose figures are in ``metrics``."""

    def __init__(
        self,
        folder: Path,
        parts: Mapping[str, Stateful],
        metrics: MetricsFile,
        config: CheckpointConfig,
        say: Callable[[str], None],
        events: EventLog,
        guard: Guard,
    ) -> None:
        self._folder, self._parts, self._metrics, self._config = folder, parts, metrics, config
        self._say, self._events, self._guard = say, events, guard
        self._failures = 0
        self._last = time.monotonic()

    def resume(self) -> int:
        """Put the newest checkpoint that verifies into the parts, in their order; returns the number of steps done.

        Raises ``CheckpointError`` when there are checkpoints and none can be trusted, or when one does not fit the parts.
        """
        checkpoint = load_checkpoint(self._folder, self._say)
        if checkpoint is None:
            return 0
        for name, part in self._parts.items():
            try:
                part.load_state(checkpoint.states[name])
            # What is not there, and tensors of another shape.
            except (KeyError, RuntimeError) as error:
                raise CheckpointError(
                    f"the state of {name!r} after step {checkpoint.step} in {self._folder} does not fit ({error}); "
                    "go on with the config and the versions that wrote it (run.json), or start the run anew with --fresh"
                ) from error
        return checkpoint.step

    def due(self) -> bool:
        """Whether enough time has gone by."""
        return time.monotonic() - self._last > 60.0 * self._config.minutes

    def attempt(self, step: int) -> None:
        """Save, or say that it was not possible and go on; raises ``SaveError`` when it was not for the third time in a row."""
        try:
            self._write(step)
        except PoisonedError as error:
            self._say(f"not saved after step {step}: {error}")
        except SaveError as error:
            self._failures += 1
            if self._failures == _FAILURES:
                raise SaveError(f"{_FAILURES} times in a row, now after step {step}: {error.problem}") from error
            self._say(f"not saved after step {step}, and going on; {_FAILURES} times in a row would end the run: {error.problem}")
            with suppress(SaveError):  # it may be the same disk
                self._events.append("save failed", step=step, error=error.problem)
        else:
            self._failures = 0
        self._last = time.monotonic()

    def final(self, step: int) -> None:
        """Save before the run stops. Raises ``SaveError`` when that is not possible, ``PoisonedError`` when it would not be right."""
        try:
            self._write(step)
        except SaveError as error:
            raise SaveError(f"stopped, and not saved after step {step}: {error.problem}") from error

    def _write(self, step: int) -> None:
        self._metrics.sync()
        states = {name: part.state() for name, part in self._parts.items()}
        if name := not_finite(states):
            raise PoisonedError(f"{name} is not finite; what was saved before is intact, and is gone on from")
        save_checkpoint(self._folder, step, states, self._config.keep, anchors=self._guard.anchors())
