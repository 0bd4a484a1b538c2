"""PPO with a critic and a KL penalty to a frozen reference: the declaration. The work is in ``update.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from alignkit.adamw import AdamWConfig
from alignkit.api import (
    Component,
    Context,
    DataSource,
    OnlineOptimizer,
    OptimizerSpec,
    Plan,
    RewardStage,
    Sampling,
    SettingError,
    hookimpl,
    setting,
)

_FILTERED = (
    "responses must be drawn from the very distribution whose log-probabilities are trained; a filter or penalty in the sampler "
    "falsifies every ratio and every KL. Temperature is the one knob that both sides share"
)


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """The penalty for leaving the reference: each token's reward is lowered by coef * (log-prob - reference log-prob)."""

    kind: Literal["fixed", "adaptive"] = setting("fixed", "adaptive: the coefficient is steered towards a target (Ziegler et al. 2019)")
    coef: float = setting(0.05, "the coefficient, or where an adaptive one starts", at_least=0.0)
    target: float = setting(6.0, "adaptive: wanted KL per response, nats", above=0.0)
    stop: float | None = setting(
        100.0, "end the stage (exit code 3) when the KL per response is above this for 3 iterations, nats; none: never", above=0.0
    )
    horizon: float = setting(10_000.0, "adaptive: responses over which an error of 100% would double the coefficient", above=0.0)


@dataclass(frozen=True, kw_only=True)
class CriticConfig(AdamWConfig):
    """The value model: its own network and its own learner."""

    init: RewardStage | None = setting(None, "the stage whose reward model the critic starts from; none: the policy's backbone, a new head")
    learning_rate: float = setting(9e-6, "peak learning rate", above=0.0)
    epsilon: float = setting(1e-5, "AdamW's epsilon", above=0.0)
    clip: float | None = setting(
        None, "bound on how far a value may move in one iteration, for rewards of a size near 1; none: no bound", above=0.0
    )


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig:
    """Weights for tokens whose sampler was not quite the trainer, as in bfloat16; they multiply the policy loss."""

    kind: Literal["tis", "icepop", "sequence_mask"] = setting(
        "tis", "tis: weights are cut at high; icepop: tokens outside low .. high are left out; sequence_mask: whole responses are"
    )
    low: float = setting(0.5, "lowest weight of a token, or geometric mean weight of a response, that counts", above=0.0, at_most=1.0)
    high: float = setting(2.0, "highest", at_least=1.0)


@dataclass(frozen=True, kw_only=True)
class PtxConfig:
    """PPO-ptx: pretraining gradients mixed into those of PPO, against the alignment tax (Ouyang et al. 2022, eq. 2)."""

    data: Component[DataSource] = setting(doc="rows with a `text`")
    coef: float = setting(27.8, "weight of the pretraining text's mean loss per token", at_least=0.0)
    ratio: int = setting(8, "chunks of pretraining text to a response", at_least=1)
    max_length: int = setting(512, "tokens of a chunk; longer texts become several", at_least=2)


@dataclass(frozen=True, kw_only=True)
class PPOConfig(AdamWConfig):
    """Proximal policy optimisation (Schulman et al. 2017) as InstructGPT uses it: one response is one episode, k1 KL in the reward."""

    learning_rate: float = setting(1e-5, "peak learning rate of the policy", above=0.0)
    epsilon: float = setting(1e-5, "AdamW's epsilon", above=0.0)
    iterations: int = setting(100, "rollouts, each followed by its updates", at_least=1)
    prompts: int = setting(64, "prompts per iteration", at_least=1)
    samples_per_prompt: int = setting(1, "responses drawn to each of them", at_least=1)
    max_new_tokens: int = setting(64, "longest response, tokens", at_least=1)
    temperature: float = setting(1.0, "of sampling; log-probabilities are taken at the same temperature everywhere", above=0.0)
    epochs: int = setting(1, "passes over a rollout (InstructGPT: 1)", at_least=1)
    minibatches: int = setting(4, "optimizer steps per pass", at_least=1)
    clip: float = setting(0.2, "the ratio is clipped to 1 - clip .. 1 + clip", above=0.0, below=1.0)
    gamma: float = setting(1.0, "discount per token", above=0.0, at_most=1.0)
    lam: float = setting(0.95, "lambda of generalised advantage estimation (Schulman et al. 2016)", at_least=0.0, at_most=1.0)
    missing_eos_penalty: float = setting(0.0, "subtracted from the score of a response that did not end by itself", at_least=0.0)
    whiten_rewards: bool = setting(False, "divide token rewards by their standard deviation (it scales the KL penalty too)")
    entropy_coef: float = setting(0.0, "bonus for entropy: subtracted from the loss, times the mean entropy per token", at_least=0.0)
    early_stop_kl: float | None = setting(
        None,
        "leave out the rest of an iteration's steps once the KL to the rollout's policy exceeds 1.5 times this, nats per token",
        above=0.0,
    )
    critic_warmup: int = setting(0, "iterations at the start in which only the critic learns", at_least=0)
    ema: float | None = setting(
        None, "save an average of the weights over steps with this decay (InstructGPT: 0.992); none: the last weights", above=0.0, below=1.0
    )
    correction: CorrectionConfig | None = setting(None, "importance weights against a sampler that differs from the trainer")
    ptx: PtxConfig | None = setting(None, "pretraining text, learnt beside the rollouts")
    kl: KLConfig = setting(KLConfig(), "the penalty for leaving the reference")
    critic: CriticConfig = setting(CriticConfig(), "the value model")

    refused: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (
            "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "no_repeat_ngram_size",
            "min_new_tokens", "bad_words_ids", "logit_bias",
        ),
        _FILTERED,
    )  # fmt: skip

    def __post_init__(self) -> None:
        episodes = self.prompts * self.samples_per_prompt
        if self.minibatches > episodes:
            raise SettingError("minibatches", f"is {self.minibatches}, more than the {episodes} responses of an iteration; lower it")
        if self.whiten_rewards and episodes < 8:
            raise SettingError("whiten_rewards", f"needs a spread to measure, and an iteration has {episodes} responses; draw 8 or more")
        if self.critic_warmup >= self.iterations:
            raise SettingError("critic_warmup", f"is {self.critic_warmup}, and of {self.iterations} iterations none is left for the policy")


def plan(config: PPOConfig, rows: int) -> Plan:
    """One loop step an iteration."""
    return Plan(
        steps=config.iterations,
        rows=config.prompts,
        samples_per_prompt=config.samples_per_prompt,
        sampling=Sampling(max_new_tokens=config.max_new_tokens, temperature=config.temperature),
    )


def build(config: PPOConfig, context: Context) -> OnlineOptimizer:
    """The optimizer for the policy that the stage starts from."""
    from alignkit_ppo.update import PPO

    return PPO(config, context)


@hookimpl
def register_optimizers() -> list[OptimizerSpec]:
    """Declare ``ppo``."""
    return [
        OptimizerSpec(
            kind="ppo",
            summary="PPO with a critic and a KL penalty to the reference",
            config=PPOConfig,
            feed="rollouts",
            plan=plan,
            build=build,
        )
    ]
