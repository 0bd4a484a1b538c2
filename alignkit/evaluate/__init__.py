"""The declarations of the core's evaluators. Torch-free; the work of each is in the module that has its name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignkit.errors import SettingError
from alignkit.interfaces import DataSource, Evaluator, EvaluatorSpec, RewardSource
from alignkit.settings import Component, PolicyStage, setting

if TYPE_CHECKING:
    from alignkit.context import Context


@dataclass(frozen=True, kw_only=True)
class WinRateConfig:
    """Two policies answer the same prompts with the same noise; a judge scores both."""

    candidate: PolicyStage = setting(doc="the stage whose policy is after")
    baseline: PolicyStage | None = setting(None, "the stage whose policy is before; none: the run's own `policy`")
    judge: Component[RewardSource] = setting(doc="what scores the answers; better not what the candidate was trained on")
    prompts: Component[DataSource] = setting(doc="held-out prompts")
    judge_data: Component[DataSource] | None = setting(
        None, "held-out prompts, each with a `response` and people's `rating` of it, to measure how well the judge agrees with people"
    )
    samples_per_prompt: int = setting(1, "answers drawn to each prompt", at_least=1)
    max_new_tokens: int = setting(64, "longest answer, tokens", at_least=1)
    temperature: float = setting(1.0, "of sampling", above=0.0)
    max_length: int = setting(512, "most tokens of a prompt", at_least=1)
    seed: int = setting(0, "added to the run's: another number draws other answers", at_least=0)
    bootstrap: int = setting(2000, "resamples behind the 95% intervals", at_least=1)
    examples: int = setting(6, "answers that are shown: those to the first prompts, not chosen", at_least=0)


@dataclass(frozen=True, kw_only=True)
class TextLossConfig:
    """Several policies read the same held-out text; each is compared with the first."""

    policies: tuple[PolicyStage, ...] = setting(doc="the stages whose policies read the text; the others are compared with the first")
    data: Component[DataSource] = setting(doc="held-out rows, each with a `text`")
    max_length: int = setting(512, "most tokens of a piece that is read at once; a longer document is cut into several", at_least=2)
    bootstrap: int = setting(2000, "resamples behind the 95% intervals", at_least=1)

    def __post_init__(self) -> None:
        if not self.policies:
            raise SettingError("policies", "is empty; name at least one earlier stage that makes a policy")
        for i, name in enumerate(self.policies):
            if name in self.policies[:i]:
                raise SettingError(f"policies.{i}", f'is "{name}", which is in the list already; name each stage once')


def _build_win_rate(config: WinRateConfig, context: Context) -> Evaluator:
    from alignkit.evaluate.win_rate import WinRate

    return WinRate(config, context)


def _build_text_loss(config: TextLossConfig, context: Context) -> Evaluator:
    from alignkit.evaluate.text_loss import TextLoss

    return TextLoss(config, context)


WIN_RATE = EvaluatorSpec(
    kind="win_rate",
    summary="a judge compares two policies' answers to the same held-out prompts",
    config=WinRateConfig,
    build=_build_win_rate,
)

TEXT_LOSS = EvaluatorSpec(
    kind="text_loss",
    summary="mean nats per token of held-out plain text under the policies of finished stages",
    config=TextLossConfig,
    build=_build_text_loss,
)
