"""The reward model: an optimizer that trains it from rankings, and a reward source that scores with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from alignkit.adamw import AdamWConfig
from alignkit.api import (
    Component,
    Context,
    DataSource,
    OfflineOptimizer,
    OptimizerSpec,
    Plan,
    RankedRows,
    RewardSource,
    RewardSpec,
    RewardStage,
    SettingError,
    hookimpl,
    setting,
)


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(AdamWConfig):
    """The K-wise ranking loss of InstructGPT (Ouyang et al. 2022, eq. 1): all pairs of a prompt in one batch element."""

    learning_rate: float = setting(9e-6, "peak learning rate of the backbone", above=0.0)
    head_learning_rate: float = setting(1e-3, "peak learning rate of the scalar head, which starts from nothing", above=0.0)
    epochs: int = setting(1, "passes over the rankings; more overfit (InstructGPT)", at_least=1)
    batch: int = setting(16, "rankings per step", at_least=1)
    center: float = setting(0.0, "weight of the squared sum of a pair's rewards: keeps them near 0 (arXiv:2312.09244)", at_least=0.0)
    normalize: Literal["none", "standard", "demonstrations"] = setting(
        "standard",
        "of what is saved. standard: ranked responses get mean 0 and std 1, so that KL coefficients keep their meaning; "
        "demonstrations: demonstrations get mean 0 (InstructGPT)",
    )
    demonstrations: Component[DataSource] | None = setting(None, "for normalize: demonstrations: those whose mean score becomes 0")
    cross_validate: Literal["none", "labeler"] = setting(
        "none", "labeler: how well labelers are predicted whose rankings were not trained on; it trains one more model a fold"
    )
    folds: int = setting(5, "groups of labelers for cross_validate", at_least=2)

    def __post_init__(self) -> None:
        given = self.demonstrations is not None
        if given != (self.normalize == "demonstrations"):
            unused = "is used by normalize: demonstrations alone; remove it"
            raise SettingError("demonstrations", unused if given else "is missing; normalize: demonstrations needs it")


@dataclass(frozen=True, kw_only=True)
class TrainedRewardConfig:
    """A reward model that an earlier stage trained."""

    stage: RewardStage = setting(doc="the stage whose reward model scores")


def plan(config: RewardModelConfig, rows: int) -> Plan:
    """Whole passes over the rankings."""
    return Plan(steps=math.ceil(config.epochs * rows / config.batch), rows=min(config.batch, rows))


def build(config: RewardModelConfig, context: Context) -> OfflineOptimizer[list[RankedRows]]:
    """The optimizer for a scalar model on the backbone that the stage starts from."""
    from alignkit_reward_model.update import RewardModel

    return RewardModel(config, context)


def build_source(config: TrainedRewardConfig, context: Context) -> RewardSource:
    """The trained model as a reward source."""
    from alignkit_reward_model.source import TrainedReward

    return TrainedReward(context.load_scalar(config.stage, False), checks=context.checks)


@hookimpl
def register_optimizers() -> list[OptimizerSpec]:
    """Declare the training."""
    return [
        OptimizerSpec(
            kind="reward_model",
            summary="trains a reward model from rankings of 2 to 9 responses",
            config=RewardModelConfig,
            feed="rankings",
            makes="reward_model",
            plan=plan,
            build=build,
        )
    ]


@hookimpl
def register_rewards() -> list[RewardSpec]:
    """Declare the scoring."""
    return [
        RewardSpec(
            kind="reward_model", summary="a reward model trained by an earlier stage", config=TrainedRewardConfig, build=build_source
        )
    ]
