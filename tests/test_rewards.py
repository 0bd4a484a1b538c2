import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from alignkit.errors import PluginError, RunError, SettingError
from alignkit.interfaces import State
from alignkit.rewards import MixConfig, MixedReward, PythonConfig, PythonReward
from alignkit.types import Message, Prompt, Sample, Score

Write = Callable[[str, str], PythonReward]
"""Writes a module with a reward function of that body, and makes a reward source of it."""


def samples(*responses: str) -> list[Sample]:
    return [Sample(Prompt(str(i), (Message("user", "?"),)), response) for i, response in enumerate(responses)]


class Fixed:
    def __init__(self, *values: float | None) -> None:
        self.values = values

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        return [Score(value, reason=None if value is not None else "asleep") for value in self.values]


@pytest.fixture
def function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    def write(name: str, body: str) -> PythonReward:
        (tmp_path / f"{name}.py").write_text(f"def reward(samples):\n    return {body}\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        return PythonReward(PythonConfig(function=f"{name}:reward"))

    return write


def test_any_function_is_a_reward_source(function: Write) -> None:
    scores = function("lengths", "[len(s.response) for s in samples]").score(samples("ab", "abcd"))
    assert [score.value for score in scores] == [2.0, 4.0]


def test_none_is_no_verdict_and_never_zero(function: Write) -> None:
    scores = function("silent", "[None, 0.0]").score(samples("a", "b"))
    assert scores[0].value is None
    assert scores[0].reason == "silent:reward returned None"
    assert scores[1].value == 0.0


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("few", "[1.0]", "returned 1 scores for 2 samples; one each is needed"),
        ("words", "['good', 'bad']", "returned 'good'; allowed: a finite number, a Score, or None"),
        ("endless", "[float('nan'), 1.0]", "returned nan; allowed"),
    ],
)
def test_a_wrong_answer_is_refused_and_shown(function: Write, name: str, body: str, message: str) -> None:
    with pytest.raises(RunError, match=message.replace("(", r"\(")):
        function(name, body).score(samples("a", "b"))


def test_a_function_that_is_not_there_is_named() -> None:
    with pytest.raises(PluginError, match="cannot import 'nowhere_at_all'"):
        PythonReward(PythonConfig(function="nowhere_at_all:f"))
    with pytest.raises(PluginError, match="the module 'math' has no 'nope'"):
        PythonReward(PythonConfig(function="math:nope"))
    with pytest.raises(PluginError, match="'pi' is a float, not a function"):
        PythonReward(PythonConfig(function="math:pi"))
    with pytest.raises(SettingError, match="module:function"):
        PythonConfig(function="just_a_name")


def test_a_mix_is_the_weighted_sum_and_keeps_its_parts() -> None:
    mix = MixedReward({"kind": (2.0, Fixed(1.0, 0.5)), "short": (-1.0, Fixed(3.0, 1.0))})
    scores = mix.score(samples("a", "b"))
    assert [score.value for score in scores] == [-1.0, 0.0]
    assert scores[0].parts == {"kind": 1.0, "short": 3.0}


def test_a_mix_without_one_of_its_parts_has_no_verdict() -> None:
    score = MixedReward({"kind": (1.0, Fixed(1.0)), "short": (1.0, Fixed(None))}).score(samples("a"))[0]
    assert score.value is None
    assert score.reason == "short: asleep"
    assert math.isclose(score.parts["kind"], 1.0)


def test_a_mix_needs_parts_with_names_of_their_own() -> None:
    with pytest.raises(SettingError, match="is empty"):
        MixConfig(parts=())


class Remembering(Fixed):
    """Scores with how many samples it has seen."""

    def __init__(self) -> None:
        self.seen = 0

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        self.seen += len(samples)
        return [Score(float(self.seen)) for _ in samples]

    def state(self) -> State:
        return State(values={"seen": self.seen})

    def load_state(self, state: State) -> None:
        self.seen = state.values["seen"]


def test_a_mix_keeps_what_its_parts_remember() -> None:
    mix = MixedReward({"old": (1.0, Remembering()), "fixed": (1.0, Fixed(1.0))})
    for _ in range(3):
        mix.score(samples("a"))
    again = MixedReward({"old": (1.0, Remembering()), "fixed": (1.0, Fixed(1.0))})
    again.load_state(mix.state())
    assert again.score(samples("a"))[0].value == mix.score(samples("a"))[0].value == 5.0
