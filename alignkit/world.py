"""What a run's numbers depend on besides its state: the config, what it reads, versions. A change is refused, or accepted and noted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from alignkit.errors import RunError
from alignkit.interfaces import State
from alignkit.tracking import EventLog


class Changes:
    """What to do when something is not as it was: ``accepted`` says that the user wants to go on all the same."""

    def __init__(self, accepted: bool, say: Callable[[str], None], events: EventLog) -> None:
        self._accepted, self._say, self._events = accepted, say, events

    def settle(self, what: str, found: Sequence[str]) -> None:
        """Say and note what was ``found`` to differ. Raises ``RunError`` with all of it unless it is accepted."""
        if not found:
            return
        listed = "".join(f"\n  {change}" for change in found)
        if not self._accepted:
            raise RunError(
                f"{what} was begun with something else:{listed}\n"
                "put it back, choose another folder with dir=PATH, start anew with --fresh (the old folder is kept), "
                "or go on with what is there now: --accept-changes (stages that are done stay as they are)"
            )
        self._say(f"{what} goes on with changes:{listed}")
        self._events.append("changes accepted", what=what, changes=list(found))

    def warn(self, found: Sequence[str]) -> None:
        """Say and note what may round differently; it stops nothing."""
        if found:
            self._say("this is not what the run began on, so it goes on close, not exact:" + "".join(f"\n  {change}" for change in found))
            self._events.append("rounds differently", changes=list(found))


class Inputs:
    """The sha256 of everything that a stage reads, by name. Part of its checkpoints, and loaded first: the rest rests on it."""

    def __init__(self, stage: str, hashes: Mapping[str, str], changes: Changes) -> None:
        self._stage, self._hashes, self._changes = stage, hashes, changes

    def state(self) -> State:
        """The hashes."""
        return State(values=dict(self._hashes))

    def load_state(self, state: State) -> None:
        """Look whether they are what they were. Raises ``RunError`` if not, unless that is accepted."""
        self._changes.settle(f"stage {self._stage}", sorted(differences(state.values, dict(self._hashes))))


def differences(before: Any, now: Any, where: str = "") -> Iterator[str]:
    """``key: old -> new`` for each leaf that differs; stages are named, not numbered."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in {**before, **now}:
            yield from differences(before.get(key), now.get(key), f"{where}.{key}" if where else str(key))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, (old, new) in enumerate(zip(before, now, strict=True)):
            name = old.get("name", i) if isinstance(old, dict) else i
            yield from differences(old, new, f"{where}.{name}" if where != "stages" else str(name))
    elif before != now:
        yield f"{where}: {json.dumps(before)} -> {json.dumps(now)}"
