"""The core's reward sources: any Python function, and a weighted mix of sources. Torch-free."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.errors import PluginError, RunError, SettingError
from alignkit.interfaces import RewardSource, State, Stateful
from alignkit.settings import Component, setting
from alignkit.types import Sample, Score


@dataclass(frozen=True, kw_only=True)
class PythonConfig:
    """A function that takes a list of samples and returns one score each: a float, a ``Score``, or None for no verdict."""

    function: str = setting(doc="import path, module:function; modules in the working directory are found too")

    def __post_init__(self) -> None:
        module, _, name = self.function.partition(":")
        if not module or not name:
            raise SettingError("function", f'is "{self.function}"; allowed: module:function, such as my_rewards:brevity')


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """One part of a mix."""

    name: str = setting(doc="under which the part is logged, as reward/part.NAME_mean")
    weight: float = setting(1.0, "its factor in the sum; negative for a penalty")
    source: Component[RewardSource] = setting(doc="what scores")


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """A weighted sum; a sample that any part has no verdict on has no score."""

    parts: tuple[PartConfig, ...] = setting(doc="what is summed")

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        if any("/" in name or "." in name for name in names):
            raise SettingError("parts", "has a name with / or . in it; names are part of metrics' names")
        if not names:
            raise SettingError("parts", "is empty; name at least one part")
        if len(set(names)) < len(names):
            raise SettingError("parts", f"has a name twice: {', '.join(names)}; each part needs its own")


class PythonReward:
    """Calls a user's function, and believes nothing that it returns before looking."""

    def __init__(self, config: PythonConfig) -> None:
        self._name = config.function
        self._function = _import(config.function)

    def score(self, samples: Sequence[Sample]) -> Sequence[Score]:
        """The function's verdicts. Raises ``RunError`` when they are not one number or None for each sample."""
        returned = list(self._function(list(samples)))
        if len(returned) != len(samples):
            raise RunError(f"reward function {self._name} returned {len(returned)} scores for {len(samples)} samples; one each is needed")
        return [self._checked(value) for value in returned]

    def _checked(self, value: Any) -> Score:
        if isinstance(value, Score):
            return value
        if value is None:
            return Score(None, reason=f"{self._name} returned None")
        if isinstance(value, bool | int | float) and math.isfinite(value):
            return Score(float(value))
        raise RunError(f"reward function {self._name} returned {value!r}; allowed: a finite number, a Score, or None for no verdict")


class MixedReward:
    """The sum of weight * value over its parts, which are kept in ``Score.parts``."""

    def __init__(self, parts: Mapping[str, tuple[float, RewardSource]]) -> None:
        self._parts = parts

    def score(self, samples: Sequence[Sample]) -> Sequence[Score]:
        """One sum a sample; no verdict of a part is no verdict of the mix."""
        verdicts = {name: source.score(samples) for name, (_, source) in self._parts.items()}
        return [self._sum({name: scores[i] for name, scores in verdicts.items()}) for i in range(len(samples))]

    def state(self) -> State:
        """The states of those parts that have one."""
        states = {name: source.state() for name, (_, source) in self._parts.items() if isinstance(source, Stateful)}
        tensors = {f"{name}/{key}": tensor for name, state in states.items() for key, tensor in state.tensors.items()}
        return State(tensors, {name: dict(state.values) for name, state in states.items()})

    def load_state(self, state: State) -> None:
        """Give each part its own back."""
        for name, (_, source) in self._parts.items():
            if isinstance(source, Stateful):
                tensors = {key.removeprefix(f"{name}/"): tensor for key, tensor in state.tensors.items() if key.startswith(f"{name}/")}
                source.load_state(State(tensors, state.values[name]))

    def _sum(self, scores: Mapping[str, Score]) -> Score:
        parts = {name: score.value for name, score in scores.items() if score.value is not None}
        missing = [f"{name}: {score.reason}" for name, score in scores.items() if score.value is None]
        if missing:
            return Score(None, parts, reason="; ".join(missing))
        return Score(sum(self._parts[name][0] * value for name, value in parts.items()), parts)


def _import(path: str) -> Callable[[list[Sample]], Any]:
    module, _, name = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        # A user's own file beside the config is the usual case; a console script does not look there by itself.
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise PluginError(f"reward function {path}: cannot import {module!r}: {error}") from error
    except AttributeError as error:
        raise PluginError(f"reward function {path}: the module {module!r} has no {name!r}") from error
    if not callable(found):
        raise PluginError(f"reward function {path}: {name!r} is a {type(found).__name__}, not a function")
    function: Callable[[list[Sample]], Any] = found
    return function
