import json
from collections.abc import Callable
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignkit.context import Context
from alignkit.data.sources import FileConfig
from alignkit.errors import RunError, SettingError
from alignkit.interfaces import ScoredRollout
from alignkit.learner import Split
from alignkit.models.config import TinyLMConfig, TuningConfig
from alignkit.rollout import LocalEngine
from alignkit.settings import Component
from alignkit.testing import make_context
from alignkit.types import Message, Prompt, PromptRow, Sample, Sampling, Score
from alignkit_ppo import CorrectionConfig, CriticConfig, KLConfig, PPOConfig, PtxConfig, plan, update
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


def test_old_logprobs_are_the_samplers_only_where_it_computes_as_the_trainer_does(tmp_path: Path) -> None:
    ppo = make(tmp_path)
    batch = scored(ppo, SMALL)
    wrong = replace(batch.rollout, logprobs=batch.rollout.logprobs - 0.5, exact=False)
    metrics = ppo.update(ScoredRollout(wrong, batch.scores))
    assert abs(metrics["kl/sequence_nats"]) < 1e-5  # computed anew, so the sampler's error has no influence


def test_lora_shares_its_base_with_the_reference(tmp_path: Path) -> None:
    ppo = make(tmp_path, SMALL, replace(TINY, tuning=TuningConfig(kind="lora", rank=4)))
    assert ppo._reference.module is ppo._policy.module
    first = ppo.update(scored(ppo, SMALL))
    second = ppo.update(scored(ppo, SMALL, step=1))
    assert abs(first["kl/sequence_nats"]) < 1e-5
    assert second["kl/sequence_nats"] != 0.0


def test_frozen_layers_are_computed_once_an_iteration_and_the_update_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = replace(TINY, tuning=TuningConfig(kind="lora", rank=4, top_layers=1))
    config = replace(SMALL, epochs=2)
    found, forwards = [], []
    for share in (True, False):
        if not share:
            monkeypatch.setattr(update, "shared_trunk", lambda *models, exact: None)
        ppo = make(tmp_path / str(share), config, top)
        counts: list[int] = []
        for model in (ppo._policy.module, ppo._critic.backbone):
            model.base_model.layers[0].self_attn.register_forward_hook(lambda *_, counts=counts: counts.append(1))
        batch = scored(ppo, config)
        counts.clear()
        # Whatever this machine decodes with, nothing is to be computed anew.
        metrics = ppo.update(replace(batch, rollout=replace(batch.rollout, exact=True)))
        forwards.append(len(counts))
        found.append((metrics, weights(ppo)))
    # One microbatch; otherwise: reference, critic, and six minibatches of both.
    assert forwards == [1, 14]
    (ours, shared), (theirs, plain) = found
    assert ours == pytest.approx(theirs, abs=1e-4)
    for name, weight in plain.items():
        assert torch.allclose(shared[name], weight, atol=2e-5), name


@pytest.mark.parametrize("tuning", [TuningConfig(), TuningConfig(kind="lora", rank=4), TuningConfig(kind="lora", rank=4, top_layers=1)])
def test_policy_and_critic_learn_beside_each_other_what_they_learn_one_after_the_other(tmp_path: Path, tuning: TuningConfig) -> None:
    """To the bit, where each has the one thread that it has otherwise."""
    policy = replace(TINY, tuning=tuning)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(1)
        ppo = make(tmp_path / str(threads), SMALL, policy)
        metrics = []
        for step in range(2):
            batch = scored(ppo, SMALL, step)
            torch.set_num_threads(threads)
            metrics.append(ppo.update(batch))
            torch.set_num_threads(1)
        found.append((metrics, ppo.state()))
    (metrics, alone), (others, together) = found
    assert metrics == others
    assert alone.values == together.values
    assert all(torch.equal(tensor, together.tensors[name]) for name, tensor in alone.tensors.items())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompts": 2, "samples_per_prompt": 1, "minibatches": 3}, "is 3, more than the 2 responses of an iteration"),
        ({"prompts": 7, "whiten_rewards": True}, "whiten_rewards: needs a spread to measure, and an iteration has 7 responses"),
        ({"iterations": 3, "critic_warmup": 3}, "critic_warmup: is 3, and of 3 iterations none is left for the policy"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        PPOConfig(**wrong)


def text(folder: Path, count: int = 8) -> Component[Any]:
    file = folder / "text.jsonl"
    file.write_text("".join(json.dumps({"text": f"plain text number {i}"}) + "\n" for i in range(count)), encoding="utf-8")
    return Component("jsonl", FileConfig(path=str(file)))


def policy_gradients(ppo: PPO, batch: ScoredRollout, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The gradient that one step over the whole rollout is taken with, before clipping."""
    experience, _ = ppo._prepare(batch)

    def backward_only(split: Split) -> dict[str, float]:
        for share in split(SMALL.microbatch_tokens):
            share()[0].backward()
        return {}

    monkeypatch.setattr(ppo._policy_learner, "step", backward_only)
    ppo._policy_step(experience, check=False, exact=True)
    return {name: weight.grad for name, weight in ppo._policy.module.named_parameters() if weight.grad is not None}


def test_ptx_is_one_step_with_its_own_text_and_leaves_the_critic_alone(tmp_path: Path) -> None:
    config = replace(SMALL, ptx=PtxConfig(data=text(tmp_path), coef=1.0, ratio=1, max_length=16))
    plain, mixed = make(tmp_path), make(tmp_path, config)
    batch = scored(plain, SMALL)
    metrics, other = plain.update(batch), mixed.update(batch)
    assert "loss/pretraining_nats" not in metrics
    assert 4.0 < other["loss/pretraining_nats"] < 7.0  # a random model of 260 tokens: log 260 = 5.6
    assert mixed.state().values["policy"]["step"] == SMALL.minibatches
    critics = {name: tensor for name, tensor in weights(plain).items() if name.startswith("critic/")}
    assert all(torch.equal(tensor, weights(mixed)[name]) for name, tensor in critics.items())


def test_while_it_warms_up_only_the_critic_learns(tmp_path: Path) -> None:
    config = replace(SMALL, critic_warmup=1)
    ppo = make(tmp_path, config)
    before = weights(ppo)
    warming = ppo.update(scored(ppo, config))
    after = weights(ppo)
    assert warming["policy/steps_count"] == 0.0
    assert "loss/policy" not in warming
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("policy/"))
    assert any(not torch.equal(after[name], before[name]) for name in before if name.startswith("critic/"))
    assert ppo.update(scored(ppo, config, step=1))["policy/steps_count"] == SMALL.minibatches
    assert ppo.state().values["policy"]["step"] == SMALL.minibatches


def test_an_iteration_ends_early_when_the_policy_has_moved_far_from_its_rollout(tmp_path: Path) -> None:
    config = replace(SMALL, epochs=4, learning_rate=1e-2, decay="constant")
    free, held = make(tmp_path, config), make(tmp_path, replace(config, early_stop_kl=0.01))
    batch = scored(free, config)
    assert free.update(batch)["policy/steps_count"] == 12
    taken = held.update(batch)["policy/steps_count"]
    assert 1 < taken < 12
    # What was left out still counts for the learning rate, of the critic as well.
    assert held.state().values["policy"]["step"] == held.state().values["critic"]["step"] == 12


def test_the_saved_policy_is_the_average_and_the_rollouts_are_not(tmp_path: Path) -> None:
    ppo = make(tmp_path, replace(SMALL, ema=0.5, minibatches=1))
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = dict(ppo._policy.module.named_parameters())[name]
    start = weight.detach().clone()
    ppo.update(scored(ppo, SMALL))
    one = weight.detach().clone()
    ppo.update(scored(ppo, SMALL, step=1))
    two = weight.detach().clone()
    ppo.save(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")[name]
    assert torch.allclose(saved, 0.25 * start + 0.25 * one + 0.5 * two, atol=1e-7)
    assert torch.equal(weight, two)


def test_an_entropy_bonus_keeps_the_policy_undecided(tmp_path: Path) -> None:
    def entropy_after(coef: float) -> float:
        config = replace(SMALL, entropy_coef=coef, iterations=10, learning_rate=5e-3, decay="constant")
        ppo = make(tmp_path, config)
        return [ppo.update(scored(ppo, config, step))["policy/entropy_nats"] for step in range(10)][-1]

    assert entropy_after(1.0) > entropy_after(0.0) + 0.05


def test_a_sampler_that_is_off_is_measured_corrected_and_named(tmp_path: Path) -> None:
    said: list[str] = []
    config = replace(SMALL, correction=CorrectionConfig(kind="tis", high=1.5))
    context = replace(make_context(tmp_path, plan=plan(config, 100), policy=TINY), say=said.append)
    ppo, plain = PPO(config, context), make(tmp_path)
    batch = scored(ppo, config)
    lower = replace(batch.rollout, logprobs=batch.rollout.logprobs - 0.3)
    experience, metrics = ppo._prepare(ScoredRollout(lower, batch.scores))
    usual, _ = plain._prepare(batch)
    assert metrics["rollout/mismatch_nats"] == pytest.approx(0.3, abs=1e-4)
    assert "the sampler's log-probabilities are 0.30 nats per token off the trainer's" in said[0]
    assert torch.allclose(experience.advantages, usual.advantages * exp(0.3), atol=1e-4)
    assert torch.allclose(experience.old_logprobs, usual.old_logprobs, atol=1e-4)  # the ratio stays between two training forwards


@pytest.mark.parametrize(("off", "checks", "warned"), [(0.09, True, False), (0.11, True, True), (0.11, False, False)])
def test_a_rough_sampler_is_named_past_a_tenth_of_a_nat(tmp_path: Path, off: float, checks: bool, warned: bool) -> None:
    """As in bfloat16: the old log-probabilities are the trainer's, and the sampler's are compared with them."""
    said: list[str] = []
    ppo = PPO(SMALL, replace(make_context(tmp_path, plan=plan(SMALL, 100), policy=TINY), say=said.append, checks=checks))
    batch = scored(ppo, SMALL)
    rough = replace(batch.rollout, logprobs=batch.rollout.logprobs + off * batch.rollout.batch.loss_mask, exact=False)
    assert ppo.update(ScoredRollout(rough, batch.scores))["rollout/mismatch_nats"] == pytest.approx(off, abs=1e-4)
    assert [f"the sampler's log-probabilities are {off:.2f} nats per token off" in text for text in said] == [True] * warned


def test_a_rollout_of_other_weights_stops_the_run_before_anything_is_learnt(tmp_path: Path) -> None:
    ppo = make(tmp_path)
    batch = scored(ppo, SMALL)
    before = weights(ppo)
    off = ScoredRollout(replace(batch.rollout, logprobs=batch.rollout.logprobs - 0.01, exact=True), batch.scores)
    with pytest.raises(RunError, match=r"differ by 0\.01 nats .* before anything was learnt from it; likely causes: dropout"):
        ppo.update(off)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(ppo).items() if name.startswith("policy/"))

    context = replace(make_context(tmp_path, plan=plan(SMALL, 100), policy=TINY), checks=False)
    assert PPO(SMALL, context).update(off)["policy/ratio_mean"] == pytest.approx(exp(0.01), abs=0.02)


def test_value_clipping_is_counted(tmp_path: Path) -> None:
    config = replace(SMALL, epochs=3, critic=CriticConfig(clip=1e-4, learning_rate=1e-2))
    ppo = make(tmp_path, config)
    assert 0.0 < ppo.update(scored(ppo, config))["critic/clip_share"] <= 1.0


def test_an_interrupted_ppo_goes_on_to_the_same_weights_with_everything_switched_on(tmp_path: Path) -> None:
    config = replace(
        SMALL, ema=0.9, critic_warmup=1, early_stop_kl=0.02, entropy_coef=0.01, kl=KLConfig(kind="adaptive"),
        ptx=PtxConfig(data=text(tmp_path), coef=1.0, ratio=1, max_length=16),
    )  # fmt: skip
    whole, first, second = (make(tmp_path, config) for _ in range(3))
    for step in range(4):
        whole.update(scored(whole, config, step))
    for step in range(2):
        first.update(scored(first, config, step))
    second.load_state(first.state())
    for step in range(2, 4):
        second.update(scored(second, config, step))
    assert whole.state().values == second.state().values
    for name, tensor in whole.state().tensors.items():
        assert torch.equal(tensor, second.state().tensors[name]), name
