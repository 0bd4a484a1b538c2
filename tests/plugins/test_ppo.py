from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.context import Context
from alignkit.errors import RunError, SettingError
from alignkit.interfaces import ScoredRollout
from alignkit.models.config import TinyLMConfig, TuningConfig
from alignkit.rollout import LocalEngine
from alignkit.testing import make_context
from alignkit.types import Message, Prompt, PromptRow, Sample, Sampling, Score
from alignkit_ppo import CriticConfig, KLConfig, PPOConfig, plan
from alignkit_ppo.update import PPO

TINY = TinyLMConfig(hidden_size=32, layers=2, heads=2, positions=128)
SMALL = PPOConfig(iterations=4, prompts=6, samples_per_prompt=2, max_new_tokens=8, minibatches=3, learning_rate=1e-3)


def scored(ppo: PPO, config: PPOConfig, step: int = 0, score: Callable[[Sample], float | None] | None = None) -> ScoredRollout:
    """A rollout of the policy as it is now; the default reward counts the letter e."""
    prompts = [Prompt(str(i), (Message("user", "abcdef"[: i + 1]),), plain=True) for i in range(config.prompts)]
    rows = [PromptRow(prompt, ppo.policy.codec.prompt(prompt)) for prompt in prompts]
    sampling = Sampling(config.max_new_tokens, config.temperature)
    rollout = LocalEngine(0).rollout(ppo.policy, rows, sampling, samples_per_prompt=config.samples_per_prompt, step=step)
    judge = score or (lambda sample: float(sample.response.count("e")))
    return ScoredRollout(rollout, tuple(Score(judge(sample), reason="no verdict") for sample in rollout.samples))


def make(folder: Path, config: PPOConfig = SMALL, policy: TinyLMConfig = TINY) -> PPO:
    context: Context = make_context(folder, plan=plan(config, 100), policy=policy)
    return PPO(config, context)


def weights(ppo: PPO) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in ppo.state().tensors.items() if "weight/" in name}


def test_before_the_first_update_policy_and_reference_are_one(tmp_path: Path) -> None:
    ppo = make(tmp_path)
    metrics = ppo.update(scored(ppo, SMALL))
    assert abs(metrics["kl/sequence_nats"]) < 1e-5
    assert metrics["reward/total_mean"] == pytest.approx(metrics["reward/score_mean"], abs=1e-5)


def test_at_the_first_minibatch_the_ratio_is_one_and_the_loss_is_minus_the_mean_advantage(tmp_path: Path) -> None:
    config = replace(SMALL, minibatches=1)
    ppo = make(tmp_path, config)
    metrics = ppo.update(scored(ppo, config))
    assert metrics["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["policy/clip_share"] == 0.0
    assert metrics["policy/approx_kl_nats"] < 1e-9
    assert metrics["loss/policy"] == pytest.approx(0.0, abs=1e-5)  # advantages are whitened over these very tokens


@pytest.mark.parametrize("tokens", [1, 40, 100_000])
def test_the_update_does_not_depend_on_the_microbatch_size(tmp_path: Path, tokens: int) -> None:
    whole = make(tmp_path, SMALL)
    split = make(tmp_path, replace(SMALL, microbatch_tokens=tokens, critic=CriticConfig(microbatch_tokens=tokens)))
    batch = scored(whole, SMALL)
    first, second = whole.update(batch), split.update(batch)
    for name in ("loss/policy", "loss/critic", "policy/entropy_nats", "optimizer/grad_norm", "critic/grad_norm"):
        assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-6), name


def test_each_response_is_used_once_an_epoch_and_steps_are_epochs_times_minibatches(tmp_path: Path) -> None:
    config = replace(SMALL, epochs=3, minibatches=5)
    ppo = make(tmp_path, config)
    parts = list(ppo._minibatches(12))
    assert len(parts) == 15
    for epoch in range(3):
        assert sorted(i for part in parts[5 * epoch : 5 * epoch + 5] for i in part) == list(range(12))
    assert parts[:5] != parts[5:10]
    ppo.update(scored(ppo, config))
    assert ppo.state().values["policy"]["step"] == ppo.state().values["critic"]["step"] == 15


def test_the_reference_stays_and_the_critics_gradient_does_not_reach_the_policy(tmp_path: Path) -> None:
    ppo = make(tmp_path)
    reference = {name: tensor.clone() for name, tensor in ppo._reference.module.state_dict().items()}
    before = weights(ppo)
    ppo.update(scored(ppo, SMALL, score=lambda sample: 1.0))
    assert all(torch.equal(tensor, reference[name]) for name, tensor in ppo._reference.module.state_dict().items())
    after = weights(ppo)
    assert any(not torch.equal(after[name], before[name]) for name in before if name.startswith("critic/"))


def test_a_sample_without_a_score_teaches_nothing(tmp_path: Path) -> None:
    """The update is the same whatever the unscored responses were."""

    def some(sample: Sample) -> float | None:
        return None if sample.prompt.id == "2" else float(len(sample.response))

    ppo = make(tmp_path)
    batch = scored(ppo, SMALL, score=some)
    metrics = ppo.update(batch)
    assert metrics["reward/masked_count"] == 2

    other = make(tmp_path)
    ids = batch.rollout.batch.ids.clone()
    unscored = [i for i, score in enumerate(batch.scores) if score.value is None]
    ids[unscored] = torch.where(batch.rollout.batch.loss_mask[unscored], 50, ids[unscored])
    altered = ScoredRollout(replace(batch.rollout, batch=replace(batch.rollout.batch, ids=ids)), batch.scores)
    other.update(altered)
    for name, tensor in weights(ppo).items():
        assert torch.allclose(tensor, weights(other)[name], atol=1e-7), name


def test_a_rollout_without_any_score_stops_with_the_reason(tmp_path: Path) -> None:
    ppo = make(tmp_path)
    with pytest.raises(RunError, match="no response of iteration 1 was scored; the first reason: no verdict"):
        ppo.update(scored(ppo, SMALL, score=lambda sample: None))


def test_a_response_that_did_not_end_pays_the_penalty_once(tmp_path: Path) -> None:
    free, fined = make(tmp_path), make(tmp_path, replace(SMALL, missing_eos_penalty=0.7))
    batch = scored(free, SMALL)
    share = sum(sample.finished for sample in batch.rollout.samples) / len(batch.rollout.samples)
    assert share < 1.0
    difference = free.update(batch)["reward/total_mean"] - fined.update(batch)["reward/total_mean"]
    assert difference == pytest.approx(0.7 * (1.0 - share), abs=1e-5)


def test_old_logprobs_are_the_samplers_only_where_it_computes_as_the_trainer_does(tmp_path: Path) -> None:
    ppo = make(tmp_path)
    batch = scored(ppo, SMALL)
    wrong = replace(batch.rollout, logprobs=batch.rollout.logprobs - 0.5, exact=False)
    metrics = ppo.update(ScoredRollout(wrong, batch.scores))
    assert abs(metrics["kl/sequence_nats"]) < 1e-5  # computed anew, so the sampler's error has no influence


def test_the_adaptive_coefficient_moves_after_the_update_towards_the_target(tmp_path: Path) -> None:
    config = replace(SMALL, kl=KLConfig(kind="adaptive", coef=0.1, target=1.0, horizon=120.0))
    ppo = make(tmp_path, config)
    assert ppo.update(scored(ppo, config))["kl/coef"] == 0.1
    # KL is 0 at the start: the error is clipped to -0.2, over 12 episodes of a horizon of 120.
    assert ppo.update(scored(ppo, config, step=1))["kl/coef"] == pytest.approx(0.1 * (1 - 0.2 * 12 / 120))


def test_it_learns_to_say_what_is_rewarded_and_a_strong_penalty_holds_it_back(tmp_path: Path) -> None:
    def learnt(coef: float) -> tuple[list[float], float]:
        config = replace(
            SMALL, iterations=30, samples_per_prompt=16, minibatches=4, learning_rate=1e-2, decay="constant", kl=KLConfig(coef=coef),
            critic=CriticConfig(learning_rate=1e-2, decay="constant"),
        )  # fmt: skip
        ppo = make(tmp_path, config)
        figures = [ppo.update(scored(ppo, config, step)) for step in range(config.iterations)]
        return [step["reward/score_mean"] for step in figures], figures[-1]["kl/sequence_nats"]

    free, far = learnt(0.0)
    held, near = learnt(100.0)
    assert free[0] < 0.2
    assert free[-1] > 4.0  # of 8 tokens, half at least say it
    assert 1.0 < far < 100.0
    assert near < 0.3
    assert held[-1] < 0.2


def test_lora_shares_its_base_with_the_reference(tmp_path: Path) -> None:
    ppo = make(tmp_path, SMALL, replace(TINY, tuning=TuningConfig(kind="lora", rank=4)))
    assert ppo._reference.module is ppo._policy.module
    first = ppo.update(scored(ppo, SMALL))
    second = ppo.update(scored(ppo, SMALL, step=1))
    assert abs(first["kl/sequence_nats"]) < 1e-5
    assert second["kl/sequence_nats"] != 0.0


@pytest.mark.parametrize(
    ("wrong", "message"), [({"prompts": 2, "samples_per_prompt": 1, "minibatches": 3}, "is 3, more than the 2 responses of an iteration")]
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        PPOConfig(**wrong)
