"""The shape of a run's config. Every key that the YAML may hold is a field here or in the dataclass of a ``kind``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from alignkit.errors import SettingError
from alignkit.interfaces import DataSource, Evaluator, Optimizer, Policy, RewardSource, Tracker
from alignkit.settings import Component, PolicyStage, setting
from alignkit.types import Overlong


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When state is saved, and how much of it is kept."""

    minutes: float = setting(10.0, "minutes between checkpoints; one is also written when a run is interrupted", at_least=0.0)
    keep: int = setting(2, "how many checkpoints of a running stage are kept", at_least=1)


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What a run puts up with before it goes back, once, or stops."""

    skips: int = setting(
        3, "steps in a row that may be skipped for a loss or gradient that is not finite; then the stage goes back", at_least=1
    )
    skipped_share: float = setting(0.05, "the same as a share of the last 100 steps", at_least=0.0, below=1.0)
    dropped_share: float = setting(
        0.1,
        "share of a rollout's responses that may be dropped for figures that are not finite; more stops the run",
        at_least=0.0,
        below=1.0,
    )


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """A second opinion on the policy: rising reward and a falling judge mean that the reward is being exploited."""

    reward: Component[RewardSource] = setting(
        doc="the judge: a reward source that nothing is trained on, such as a rule or another reward model"
    )
    prompts: Component[DataSource] = setting(doc="held-out prompts, the same each time, answered with the same noise")
    every: int = setting(10, "iterations between two looks", at_least=1)
    stop: bool = setting(False, "end the stage (exit code 3) when the gap opens; otherwise it is a warning")


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Which of a stage's validated weights become its artifact; the figures of all of them are written to the manifest."""

    by: Literal["loss", "reward"] = setting("loss", "loss: the lowest validation loss; reward: the highest mean reward of responses drawn")
    reward: Component[RewardSource] | None = setting(None, "by reward: what scores the responses, such as an earlier stage's reward model")
    prompts: Component[DataSource] | None = setting(None, "by reward: held-out prompts, the same for every candidate, with the same noise")
    max_new_tokens: int = setting(64, "by reward: longest response, tokens", at_least=1)
    temperature: float = setting(1.0, "by reward: of sampling", above=0.0)

    def __post_init__(self) -> None:
        for name in ("reward", "prompts"):
            given = getattr(self, name) is not None
            if given and self.by == "loss":
                raise SettingError(name, "is not used to select by loss; remove it, or set by: reward")
            if not given and self.by == "reward":
                raise SettingError(name, "is missing; to select by reward, responses to prompts are drawn and scored")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage: an ``optimizer`` with what feeds it, or an ``evaluate``."""

    name: str = setting(doc="the stage's name and folder; other stages refer to it")
    start: PolicyStage | None = setting(None, "the earlier stage whose policy this stage starts from; none: the run's own `policy`")
    reference: PolicyStage | None = setting(None, "the earlier stage whose policy is the frozen reference; none: where the stage starts")
    optimizer: Component[Optimizer[Any]] | None = setting(None, "the alignment algorithm")
    data: Component[DataSource] | None = setting(None, "demonstrations or rankings, for an optimizer that learns from them")
    validation: Component[DataSource] | None = setting(None, "held-out rows of the same form as `data`")
    prompts: Component[DataSource] | None = setting(None, "prompts, for an optimizer that learns from rollouts")
    reward: Component[RewardSource] | None = setting(None, "what scores the rollouts")
    evaluate: Component[Evaluator] | None = setting(None, "a measurement of finished stages, in place of an optimizer")
    max_length: int = setting(512, "most tokens of a row (of a prompt, where rollouts are drawn)", at_least=2)
    overlong: Overlong = setting("error", "what happens to a longer row; whatever happens is counted in the manifest")
    validate_every: int = setting(0, "steps between validations; 0: only at the end", at_least=0)
    select: SelectConfig | None = setting(None, "keep the best of the validated weights; none: the last step's")
    watch: WatchConfig | None = setting(None, "where rollouts are drawn: a judge beside the reward; none: nobody else looks")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One config is one run is one folder."""

    name: str = setting(doc="the run's name")
    dir: str = setting("runs/${name}", "the run's folder")
    seed: int = setting(0, "every random choice of the run follows from it", at_least=0, at_most=2**32 - 1)
    threads: int = setting(0, "CPU threads; 0: as many as there are cores", at_least=0)
    kernels: Literal["fastest", "plain"] = setting(
        "fastest",
        "how a CPU multiplies. fastest: what is fastest when the run begins; plain: as torch does, so that a second run from the same seed "
        "has the same weights to the bit, whatever is fastest then",
    )
    policy: Component[Policy] = setting(doc="the model to align")
    stages: tuple[StageConfig, ...] = setting(doc="what is done, in order")
    trackers: tuple[Component[Tracker], ...] = setting((), "where metrics go besides the terminal and metrics.jsonl")
    checks: Literal["on", "off"] = setting(
        "on", "on: what must always hold is checked while the run runs, and a violation stops it with the likely causes"
    )
    checkpoint: CheckpointConfig = setting(CheckpointConfig(), "when state is saved")
    guard: GuardConfig = setting(GuardConfig(), "what is done about figures that are not finite")
