"""What happens when scores do not come: the stage is put back to the end of its last step and saved, and the run may be continued later."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

from alignkit.errors import Unavailable
from alignkit.interfaces import RewardSource, State, Stateful
from alignkit.loops import After
from alignkit.saving import Saves
from alignkit.types import Metrics, Sample, Score

_OPTIMIZER = "optimizer"


class Scoring:
    """A stage's reward source. ``parts``: whatever the stage saves; ``first``: the steps that were done, and saved, before."""

    def __init__(self, reward: RewardSource, parts: Mapping[str, Stateful], saves: Saves, first: int, say: Callable[[str], None]) -> None:
        # The optimizer waits for the scores: it is still what the last step made of it.
        self._others = {name: part for name, part in parts.items() if name != _OPTIMIZER}
        self._reward, self._saves, self._say = reward, saves, say
        self._first = self._done = first
        self._states = self._copies()

    def score(self, samples: Sequence[Sample]) -> Sequence[Score]:
        """The source's scores. Where it raises ``Unavailable``, the last whole step is saved first."""
        try:
            return self._reward.score(samples)
        except Unavailable:
            if self._done > self._first:
                for name, part in self._others.items():
                    part.load_state(self._states[name])
                self._saves.final(self._done)
                self._say(f"saved after step {self._done}")
            raise

    def remembering(self, after: After) -> After:
        """``after``, and then a copy of what the next step will have moved by the time it asks for scores."""

        def remember(step: int, metrics: Metrics) -> None:
            after(step, metrics)
            self._done, self._states = step, self._copies()

        return remember

    def _copies(self) -> dict[str, State]:
        states = {name: part.state() for name, part in self._others.items()}
        return {
            name: State({key: tensor.clone() for key, tensor in state.tensors.items()}, copy.deepcopy(dict(state.values)))
            for name, state in states.items()
        }
