from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.context import Context
from alignkit.data.collate import collate
from alignkit.data.order import Order
from alignkit.interfaces import ScoredRollout
from alignkit.loops import offline, online
from alignkit.models.config import TuningConfig
from alignkit.rollout import LocalEngine
from alignkit.testing import CountingReward
from alignkit.types import Message, Metrics, Prompt, PromptRow, RankedRows, Sample, Sampling, Score
from alignkit_ppo import PPOConfig
from alignkit_ppo import plan as ppo_plan
from alignkit_ppo.update import PPO
from alignkit_reward_model import RewardModelConfig
from alignkit_reward_model import plan as reward_plan
from alignkit_reward_model.update import RewardModel
from alignkit_sft import SFTConfig
from alignkit_sft import plan as sft_plan
from alignkit_sft.update import SFT
from tests.fakes import ARCHITECTURES
from tests.invariants.vivid import Architecture, shake, vivid_context, vivid_policy

LORA = TuningConfig(kind="lora", rank=4)
WORDS = ("one", "eleven", "seventeen", "four", "twenty", "six")


def timeless(metrics: Metrics) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("time/")}


def trained_by_demonstrations(context: Callable[[Any], Context], figures: list[dict[str, float]]) -> dict[str, torch.Tensor]:
    config = SFTConfig(batch=2, learning_rate=1e-3)
    surroundings = context(sft_plan(config, 8))
    sft = SFT(config, surroundings)
    rows = [sft._policy.codec.sample(Sample(Prompt(word, (Message("user", word),)), word.upper())) for word in WORDS]
    order = Order(len(rows), surroundings.seed, "sft")
    offline(sft, rows, order, surroundings.plan, first=0, after=lambda step, metrics: figures.append(timeless(metrics)))
    return dict(sft.state().tensors)


def trained_by_rankings(context: Callable[[Any], Context], figures: list[dict[str, float]]) -> dict[str, torch.Tensor]:
    config = RewardModelConfig(batch=2, learning_rate=1e-3)
    surroundings = context(reward_plan(config, 8))
    model = RewardModel(config, surroundings)
    codec = vivid_policy("llama").codec
    prompts = [Prompt(word, (Message("user", word),)) for word in WORDS]
    rows = [RankedRows(p.id, (codec.sample(Sample(p, p.id)), codec.sample(Sample(p, "no"))), ranks=(1, 2)) for p in prompts]
    order = Order(len(rows), surroundings.seed, "reward")
    offline(model, rows, order, surroundings.plan, first=0, after=lambda step, metrics: figures.append(timeless(metrics)))
    return dict(model.state().tensors)


def trained_by_rollouts(context: Callable[[Any], Context], figures: list[dict[str, float]]) -> dict[str, torch.Tensor]:
    config = PPOConfig(
        iterations=3, prompts=3, samples_per_prompt=2, max_new_tokens=6, minibatches=2, epochs=2, learning_rate=1e-3, temperature=0.8
    )
    surroundings = context(ppo_plan(config, 8))
    ppo = PPO(config, surroundings)
    prompts = [Prompt(word, (Message("user", word),)) for word in WORDS]
    rows = [PromptRow(prompt, ppo.policy.codec.prompt(prompt)) for prompt in prompts]
    order = Order(len(rows), surroundings.seed, "ppo")
    online(
        ppo, ppo.policy, LocalEngine(surroundings.seed), CountingReward("e"), rows, order, surroundings.plan, first=0,
        after=lambda step, metrics: figures.append(timeless(metrics)),
    )  # fmt: skip
    return dict(ppo.state().tensors)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("train", [trained_by_demonstrations, trained_by_rankings, trained_by_rollouts])
def test_i_all_1_the_same_seed_brings_the_same_losses(architecture: Architecture, train: Any, tmp_path: Path) -> None:
    """Done again with the same seed, every figure of every step and every weight is the same to the last bit; with another it is not."""

    def done(seed: int) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        # Whatever torch's own generator is at, it has no say.
        torch.manual_seed(torch.initial_seed() % 1000 + 1)
        figures: list[dict[str, float]] = []
        tensors = train(lambda plan: vivid_context(tmp_path, architecture, plan, seed=seed), figures)
        return figures, {name: tensor.clone() for name, tensor in tensors.items()}

    (figures, tensors), (again, same), (others, _) = done(1), done(1), done(2)
    assert len(figures) > 2
    assert again == figures
    assert same.keys() == tensors.keys()
    assert all(torch.equal(same[name], tensors[name]) for name in tensors)
    assert others != figures


def rows() -> Any:
    codec = vivid_policy("llama").codec
    return collate([codec.sample(Sample(Prompt(word, (Message("user", word),)), word.upper())) for word in WORDS])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_all_2_adapters_begin_as_the_base_and_switched_off_they_are_not_there(architecture: Architecture) -> None:
    """With fresh adapters the KL to the base is exactly 0; with trained ones the reference is still the base, to the last bit."""
    base, policy, batch = vivid_policy(architecture), vivid_policy(architecture, tuning=LORA), rows()
    reference = policy.reference()
    with torch.no_grad():
        of_base = base.score_tokens(batch)
        for fresh in (policy.score_tokens(batch), reference.score_tokens(batch)):
            assert torch.equal(fresh.logprobs, of_base.logprobs)
            assert torch.equal(fresh.entropy, of_base.entropy)
        shake(policy.module, 0.1)
        assert not torch.allclose(policy.score_tokens(batch).logprobs, of_base.logprobs, atol=1e-2)
        assert torch.equal(reference.score_tokens(batch).logprobs, of_base.logprobs)
        # Asking the reference leaves the adapters where they were.
        moved = policy.score_tokens(batch).logprobs
        assert not torch.allclose(moved, of_base.logprobs, atol=1e-2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_all_2_training_adapters_leaves_their_base_alone(architecture: Architecture, tmp_path: Path) -> None:
    """PPO on adapters begins without KL, and after its updates the reference is the base, to the last bit."""
    config = PPOConfig(iterations=2, prompts=3, samples_per_prompt=2, max_new_tokens=6, minibatches=1, learning_rate=1e-2, decay="constant")
    ppo = PPO(config, vivid_context(tmp_path, architecture, ppo_plan(config, 8), tuning=LORA))
    prompts = [PromptRow(p, ppo.policy.codec.prompt(p)) for p in (Prompt(word, (Message("user", word),)) for word in WORDS[:3])]
    kl = []
    for step in range(2):
        rollout = LocalEngine(0).rollout(ppo.policy, prompts, Sampling(6), samples_per_prompt=2, step=step)
        scores = tuple(Score(float(len(sample.response))) for sample in rollout.samples)
        # Log-probabilities computed anew have the shape of the reference's, and its roundings.
        kl.append(ppo.update(ScoredRollout(replace(rollout, exact=False), scores))["kl/token_k3_nats"])
    assert kl[0] == 0.0
    assert kl[1] > 1e-4
    base, batch = vivid_policy(architecture), rows()
    with torch.no_grad():
        assert torch.equal(ppo._reference.score_tokens(batch).logprobs, base.score_tokens(batch).logprobs)
        assert not torch.allclose(ppo._policy.score_tokens(batch).logprobs, base.score_tokens(batch).logprobs, atol=1e-2)
