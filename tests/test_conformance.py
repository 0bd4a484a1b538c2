"""The conformance kit lets good plugins pass and catches each sort of bad one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from alignkit import builtin
from alignkit.api import DataSpec, RewardSpec, Row, Sample, Score, StageName, State, hookimpl, setting
from alignkit.registry import Registry
from alignkit.testing import (
    CountingReward,
    DataSourceConformance,
    ListSource,
    OptimizerConformance,
    RewardSourceConformance,
    example_samples,
    make_context,
)
from alignkit.testing.imports import assert_light
from alignkit_ppo import CriticConfig, KLConfig, PPOConfig
from alignkit_ppo import register_optimizers as ppo
from alignkit_reward_model import RewardModelConfig, TrainedRewardConfig, register_rewards
from alignkit_reward_model import register_optimizers as reward_model
from alignkit_sft import SFTConfig
from alignkit_sft import register_optimizers as sft


@dataclass(frozen=True, kw_only=True)
class CountConfig:
    """What is counted."""

    text: str = setting("e", "counted in the response")
    words: tuple[str, ...] = setting(("a", "b"), "for the sake of a list")
    limit: int = setting(3, "for the sake of a range", at_least=1)


COUNT = RewardSpec(kind="zeta_count", summary="counts", config=CountConfig, build=lambda config, context: CountingReward(config.text))
LIST = DataSpec(kind="zeta_list", summary="lists", config=CountConfig, build=lambda config: ListSource([{"prompt": "a"}, {"prompt": "b"}]))


class Here:
    """The specs of this file, as a plugin."""

    @staticmethod
    @hookimpl
    def register_rewards() -> list[RewardSpec]:
        return [COUNT]

    @staticmethod
    @hookimpl
    def register_data_sources() -> list[DataSpec]:
        return [LIST]


class TestCountingReward(RewardSourceConformance):
    """A fake that obeys."""

    spec = COUNT
    config = CountConfig(text="o", words=("c",))
    wrong = ({"limit": 0}, {"words": 3}, {"text": ["x"]})

    def registry(self) -> Registry:
        return Registry.of(builtin, Here)


class TestListSource(DataSourceConformance):
    """A fake that obeys."""

    spec = LIST
    config = CountConfig()

    def registry(self) -> Registry:
        return Registry.of(builtin, Here)


class TestSFT(OptimizerConformance):
    """The shortest optimizer that there is."""

    spec = sft()[0]
    config = SFTConfig(batch=4, learning_rate=1e-3)
    wrong = ({"epochs": 0}, {"learning_rate": -1.0})


class TestRewardModel(OptimizerConformance):
    """Fed with rankings."""

    spec = reward_model()[0]
    config = RewardModelConfig(batch=4)


class TestPPO(OptimizerConformance):
    """Fed with rollouts."""

    spec = ppo()[0]
    config = PPOConfig(iterations=3, prompts=4, minibatches=2, max_new_tokens=8, critic=CriticConfig(init=StageName("reward")))
    earlier: ClassVar[Any] = {"reward": "reward_model"}
    wrong = ({"minibatches": 5}, {"clip": 1.0})


class TestTrainedReward(RewardSourceConformance):
    """A source that reads another stage's model."""

    spec = register_rewards()[0]
    config = TrainedRewardConfig(stage=StageName("reward"))
    earlier: ClassVar[Any] = {"reward": "reward_model"}
    wrong = ({"stage": "reword"},)


class Faulty:
    """A reward source made of one function."""

    def __init__(self, score: Callable[[Sequence[Sample]], list[Any]]) -> None:
        self.score = score


class Counter:
    """Numbers its samples as they come, and forgets the number in its state."""

    def __init__(self) -> None:
        self.seen = 0

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        self.seen += 1
        return [Score(float(self.seen)) for _ in samples]

    def state(self) -> State:
        return State(values={"seen": (self.seen,)})

    def load_state(self, state: State) -> None:
        pass


def kit_of(source: Any) -> RewardSourceConformance:
    kit = TestCountingReward()
    kit.spec = RewardSpec(kind="faulty", summary="", config=CountConfig, build=lambda config, context: source)
    return kit


@pytest.mark.parametrize(
    ("score", "test", "message"),
    [
        (lambda samples: [Score(1.0)] * (len(samples) - 1), "test_each_sample_has_one_score", "9 scores for 10 samples"),
        (lambda samples: [1.0 for _ in samples], "test_each_sample_has_one_score", "is not a Score"),
        (lambda samples: [Score(None) for _ in samples], "test_each_sample_has_one_score", "no reason"),
        (lambda samples: [Score(math.nan) for _ in samples], "test_each_sample_has_one_score", "nan for"),
        (lambda samples: [Score(0.0)], "test_nothing_in_nothing_out", "for no samples"),
        (lambda samples: [Score(float(len(samples))) for _ in samples], "test_a_score_does_not_depend_on_the_batch", "among others"),
        (lambda samples: [Score(float(samples[0].response == "")) for _ in samples], "test_a_score_does_not_depend_on_the_batch", "alone"),
    ],
)
def test_a_faulty_source_is_caught(score: Any, test: str, message: str, tmp_path: Path) -> None:
    check = getattr(kit_of(Faulty(score)), test)
    with pytest.raises(AssertionError, match=message):
        check(*([tmp_path] if "tmp_path" in check.__code__.co_varnames else []))


def test_a_state_that_json_cannot_hold_is_caught(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="not plain JSON"):
        kit_of(Counter()).test_a_loaded_state_scores_the_same(tmp_path)


class Forgetful:
    """Counts what it has scored, and on loading begins anew; ``honest`` says that its state shows it."""

    def __init__(self, honest: bool) -> None:
        self.seen, self._shown, self._honest = 0, 0, honest

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        self.seen += len(samples)
        return [Score(float(self.seen)) for _ in samples]

    def state(self) -> State:
        return State(values={"seen": self.seen if self._honest else max(self.seen, self._shown)})

    def load_state(self, state: State) -> None:
        self._shown = state.values["seen"]


@pytest.mark.parametrize(("honest", "message"), [(True, "is not what was saved: {'seen': 0}"), (False, "became Score")])
def test_a_source_that_does_not_load_is_caught(honest: bool, message: str, tmp_path: Path) -> None:
    kit = TestCountingReward()
    kit.spec = RewardSpec(kind="faulty", summary="", config=CountConfig, build=lambda config, context: Forgetful(honest))
    with pytest.raises(AssertionError, match=re.escape(message)):
        kit.test_a_loaded_state_scores_the_same(tmp_path)


class Amnesiac:
    """An optimizer whose state lacks something: what ``keeps`` does not let through."""

    def __init__(self, optimizer: Any, keeps: Callable[[State], State]) -> None:
        self._optimizer, self._keeps = optimizer, keeps
        self.update, self.load_state = optimizer.update, optimizer.load_state

    def state(self) -> State:
        return self._keeps(self._optimizer.state())


def without_tensors(prefix: str) -> Callable[[State], State]:
    return lambda state: State({k: v for k, v in state.tensors.items() if not k.startswith(prefix)}, state.values)


def with_values(**values: Any) -> Callable[[State], State]:
    return lambda state: State(state.tensors, {**state.values, **values})


def without_steps(learner: str) -> Callable[[State], State]:
    return lambda state: State(state.tensors, {**state.values, learner: {**state.values[learner], "step": 0}})


ITEMS: dict[str, tuple[Callable[[State], State], str]] = {
    "policy": (without_tensors("policy/weight/"), "the metrics were"),
    "policy's moments": (without_tensors("policy/adam."), "the metrics were"),
    "policy's step": (without_steps("policy"), "the metrics were"),
    "critic": (without_tensors("critic/weight/"), "the metrics were"),
    "critic's moments": (without_tensors("critic/adam."), "the metrics were"),
    "critic's step": (without_steps("critic"), "the metrics were"),
    "KL coefficient": (with_values(kl_coef=0.05), "the metrics were"),
    "iteration": (with_values(iteration=0), "the metrics were"),
}


@pytest.mark.parametrize("item", ITEMS)
def test_an_optimizer_that_forgets_one_item_is_caught(item: str, tmp_path: Path) -> None:
    forget, message = ITEMS[item]
    kit = TestPPO()
    adaptive = KLConfig(kind="adaptive", target=1.0, horizon=20.0)
    kit.config = replace(TestPPO.config, kl=adaptive, warmup=0.5, learning_rate=1e-2, whiten_rewards=False)
    build = TestPPO.spec.build
    kit.spec = replace(TestPPO.spec, build=lambda config, context: Amnesiac(build(config, context), forget))
    with pytest.raises(AssertionError, match=message):
        kit.test_a_loaded_state_continues_on_the_same_trajectory(tmp_path)


def test_a_missing_entry_point_is_caught() -> None:
    kit = TestCountingReward()
    kit.spec = RewardSpec(kind="zeta_other", summary="", config=CountConfig, build=COUNT.build)
    with pytest.raises(Exception, match='no reward source of kind "zeta_other"'):
        kit.test_the_kind_is_found()


def test_a_setting_that_should_have_been_refused_is_caught() -> None:
    kit: RewardSourceConformance = TestCountingReward()
    kit.wrong = ({"limit": 5},)
    with pytest.raises(AssertionError, match="'limit': 5} was accepted"):
        kit.test_mistakes_in_the_config_are_refused_with_a_message()


def test_rows_in_another_order_are_caught() -> None:
    class Shuffled:
        turn = 0

        def rows(self) -> Iterable[Row]:
            self.turn += 1
            return [Row({"prompt": "a"}, "x:1"), Row({"prompt": "b"}, "x:2")][:: 1 if self.turn % 2 else -1]

    kit = TestListSource()
    kit.spec = DataSpec(kind="zeta_list", summary="", config=CountConfig, build=lambda config: Shuffled())
    with pytest.raises(AssertionError, match="asked again"):
        kit.test_rows_are_the_same_every_time()


def test_a_heavy_declaration_is_caught() -> None:
    with pytest.raises(AssertionError, match=r"importing alignkit\.learner imports .*torch"):
        assert_light(["alignkit.errors", "alignkit.learner"])


def test_the_context_has_one_tiny_model_and_makes_it_when_asked(tmp_path: Path) -> None:
    context = make_context(tmp_path, registry=Registry.of(builtin))
    assert list(tmp_path.iterdir()) == []
    policy = context.load_policy("sft", False)
    row = policy.codec.sample(example_samples()[0])
    assert policy.codec.decode([token for token, trained in zip(row.ids, row.loss_mask, strict=True) if trained]) == "It is Paris."
    assert context.artifact(None) == context.artifact("sft") == tmp_path / "tiny_lm"
