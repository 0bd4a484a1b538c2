"""PPO with a critic and a KL penalty to a frozen reference: the declaration. The work is in ``update.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from alignkit.adamw import AdamWConfig
from alignkit.api import Context, OnlineOptimizer, OptimizerSpec, Plan, RewardStage, Sampling, SettingError, hookimpl, setting


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """The penalty for leaving the reference: each token's reward is lowered by coef * (log-prob - reference log-prob)."""

    kind: Literal["fixed", "adaptive"] = setting("fixed", "adaptive: the coefficient is steered towards a target (Ziegler et al. 2019)")
    coef: float = setting(0.05, "the coefficient, or where an adaptive one starts", at_least=0.0)
    target: float = setting(6.0, "adaptive: wanted KL per response, nats", above=0.0)
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
    kl: KLConfig = setting(KLConfig(), "the penalty for leaving the reference")
    critic: CriticConfig = setting(CriticConfig(), "the value model")

    def __post_init__(self) -> None:
        episodes = self.prompts * self.samples_per_prompt
        if self.minibatches > episodes:
            raise SettingError("minibatches", f"is {self.minibatches}, more than the {episodes} responses of an iteration; lower it")


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
