from __future__ import annotations

import importlib
import inspect
import itertools
import json
import math
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alignkit import ops
from alignkit.data.collate import collate
from alignkit.data.sources import FileConfig
from alignkit.interfaces import ScoredRollout, TokenBatch
from alignkit.learner import Learner
from alignkit.models.causal_lm import CausalPolicy
from alignkit.ops.losses import clipped_policy_loss, clipped_share, clipped_value_loss
from alignkit.ops.masked import masked_mean
from alignkit.rollout import LocalEngine
from alignkit.settings import Component
from alignkit.types import Message, Metrics, Prompt, PromptRow, Sample, Sampling, Score
from alignkit_ppo import CorrectionConfig, CriticConfig, KLConfig, PPOConfig, PtxConfig, plan
from alignkit_ppo.experience import Experience
from alignkit_ppo.update import PPO
from alignkit_reward_model.source import TrainedReward
from tests.fakes import ARCHITECTURES
from tests.invariants.vivid import Architecture, first_gradient, gradient_of, relative_distance, shake, vivid_context
from tests.ops.ragged import GARBAGE, Ragged, ragged

UNCLIPPED = PPOConfig(
    iterations=4, prompts=4, samples_per_prompt=2, max_new_tokens=7, minibatches=2, learning_rate=1e-3, clip_norm=1e9,
    critic=CriticConfig(learning_rate=1e-3, clip_norm=1e9),
)  # fmt: skip
"""Eight responses; gradients are seen as they are."""

ONE_STEP = replace(UNCLIPPED, minibatches=1)


def length(sample: Sample) -> float:
    return 0.5 * len(sample.response) - sample.index


def make(folder: Path, architecture: Architecture, config: PPOConfig = UNCLIPPED, *, moved: float = 0.0) -> PPO:
    """PPO at its start, with a policy that has ``moved`` away from its reference, and responses of one to all tokens."""
    ppo = PPO(config, vivid_context(folder, architecture, plan(config, 100)))
    # A fifth of all tokens ends a response.
    ppo._policy.codec.stop_ids = tuple(range(3, 55))
    if moved:
        shake(ppo._policy.module, moved, seed=9)
    return ppo


def scored(ppo: PPO, config: PPOConfig = UNCLIPPED, step: int = 0, score: Callable[[Sample], float] = length) -> ScoredRollout:
    """A rollout of the policy as it is now."""
    prompts = [Prompt(str(i), (Message("user", "abcdefgh"[: i + 1]),), plain=True) for i in range(config.prompts)]
    rows = [PromptRow(prompt, ppo.policy.codec.prompt(prompt)) for prompt in prompts]
    sampling = Sampling(config.max_new_tokens, config.temperature)
    rollout = LocalEngine(0).rollout(ppo.policy, rows, sampling, samples_per_prompt=config.samples_per_prompt, step=step)
    return ScoredRollout(rollout, tuple(Score(score(sample)) for sample in rollout.samples))


def computed_anew(batch: ScoredRollout) -> ScoredRollout:
    """The rollout without trust in the sampler: old log-probabilities come from the training forward, in the shape of the reference's."""
    return replace(batch, rollout=replace(batch.rollout, exact=False))


def padded(batch: ScoredRollout, garbage: float, columns: int = 5) -> ScoredRollout:
    """The rollout with more padding on the right, and with garbage wherever there is nothing to see."""
    rollout = batch.rollout

    def wide(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, columns))

    tokens = TokenBatch(wide(rollout.batch.ids), wide(rollout.batch.mask), wide(rollout.batch.loss_mask))
    tokens.ids[~tokens.mask] = 77
    logprobs = torch.where(tokens.loss_mask, wide(rollout.logprobs), garbage)
    return replace(batch, rollout=replace(rollout, batch=tokens, logprobs=logprobs))


def weights(ppo: PPO, part: str = "") -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in ppo.state().tensors.items() if name.startswith(part) and "weight/" in name}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def steps_of(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> list[Metrics]:
    """What each step from here on reports."""
    figures: list[Metrics] = []
    step = learner.step

    def watched(shares: Any) -> dict[str, float]:
        figures.append(step(shares))
        return dict(figures[-1])

    monkeypatch.setattr(learner, "step", watched)
    return figures


@torch.no_grad()
def reference_logprobs(ppo: PPO, batch: ScoredRollout) -> Tensor:
    return ppo._reference.score_tokens(batch.rollout.batch, temperature=ppo._config.temperature).logprobs


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_i_ppo_1_before_the_first_update_there_is_no_kl(architecture: Architecture, temperature: float, tmp_path: Path) -> None:
    """In iteration 0 the KL is 0 at every token and a response's reward is its score: exactly, or to 1e-6 by the sampler's figures."""
    config = replace(UNCLIPPED, temperature=temperature, kl=KLConfig(coef=0.5))
    ppo = make(tmp_path, architecture, config)
    batch = scored(ppo, config)
    _, metrics = ppo._prepare(computed_anew(batch))
    # k3 is never negative: where its mean is 0, it is 0 at every token.
    assert metrics["kl/token_k3_nats"] == metrics["kl/token_k1_nats"] == metrics["kl/sequence_nats"] == 0.0
    assert metrics["reward/total_mean"] == metrics["reward/score_mean"]

    experience, metrics = ppo._prepare(batch)
    off = (experience.old_logprobs - reference_logprobs(ppo, batch)).abs()
    assert float(off.max()) < 5e-6  # log-probabilities of -6 to -12 are rounded to 5e-7 or 1e-6 each
    assert abs(metrics["kl/token_k1_nats"]) < 1e-6
    assert metrics["reward/total_mean"] == pytest.approx(metrics["reward/score_mean"], abs=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_ppo_2_at_the_first_minibatch_nothing_has_moved(
    architecture: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first minibatch has ratio 1, nothing clipped, no KL to the rollout, and minus its mean advantage as its loss, to 1e-5."""
    ppo = make(tmp_path, architecture, moved=0.05)
    batch = scored(ppo)
    experience, _ = ppo._prepare(batch)
    first = experience.rows(next(ppo._minibatches(8)))
    figures = steps_of(ppo._policy_learner, monkeypatch)
    ppo.update(batch)
    assert figures[0]["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert figures[0]["policy/clip_share"] == 0.0
    assert figures[0]["policy/approx_kl_nats"] < 1e-10
    assert figures[0]["loss/policy"] == pytest.approx(-float(masked_mean(first.advantages, first.mask)), abs=1e-5)
    assert abs(figures[0]["loss/policy"]) > 1e-3
    # By the second minibatch the policy has learnt from the first.
    assert figures[1]["policy/approx_kl_nats"] > 1e-8

    # Over all tokens at once, whitened advantages have a mean of 0.
    whole = make(tmp_path, architecture, ONE_STEP, moved=0.05)
    assert whole.update(batch)["loss/policy"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_ppo_2_in_the_same_shape_it_is_exact(architecture: Architecture, tmp_path: Path) -> None:
    """Where the rollout is one row, before and in the update, the same holds to the last bit."""
    config = replace(ONE_STEP, prompts=1, samples_per_prompt=1)
    ppo = make(tmp_path, architecture, config, moved=0.05)
    batch = computed_anew(scored(ppo, config))
    experience, _ = ppo._prepare(batch)
    metrics = ppo.update(batch)
    assert metrics["policy/ratio_mean"] == metrics["policy/ratio_max"] == 1.0
    assert metrics["policy/clip_share"] == metrics["policy/approx_kl_nats"] == metrics["policy/kl_to_rollout_nats"] == 0.0
    assert metrics["loss/policy"] == -float(masked_mean(experience.advantages, experience.mask))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_i_ppo_3_at_ratio_one_it_is_the_plain_policy_gradient(architecture: Architecture, temperature: float, tmp_path: Path) -> None:
    """The first step's gradient is that of minus the mean of advantage times log-probability, to 1e-5 of its length."""
    config = replace(ONE_STEP, temperature=temperature)
    ppo, plain = (make(tmp_path, architecture, config, moved=0.05) for _ in range(2))
    batch = computed_anew(scored(ppo, config))
    experience, _ = ppo._prepare(batch)
    ppo.update(batch)
    logprobs = plain._policy.score_tokens(batch.rollout.batch, temperature=temperature).logprobs
    mask = batch.rollout.batch.loss_mask
    want = gradient_of(-(experience.advantages * logprobs)[mask].sum() / mask.sum(), plain._policy.module)
    assert relative_distance(first_gradient(ppo.state(), "policy/"), want) < 1e-5


def by_the_paper(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A_t = sum over l of (gamma lam)^l delta_(t+l), term by term on each response, in float64."""
    advantages = np.zeros(mask.shape)
    for row, counts in enumerate(mask.numpy()):
        (columns,) = np.nonzero(counts)
        r, v = rewards[row, columns].double().numpy(), np.append(values[row, columns].double().numpy(), 0.0)
        delta = r + gamma * v[1:] - v[:-1]
        for t, column in enumerate(columns):
            advantages[row, column] = sum((gamma * lam) ** k * delta[t + k] for k in range(len(delta) - t))
    return advantages


def token_rewards(ppo: PPO, batch: ScoredRollout) -> Tensor:
    """-coef * (log p - log q) at each token, and the score at the last one, row by row."""
    reference, mask = reference_logprobs(ppo, batch), batch.rollout.batch.loss_mask
    rewards = torch.zeros(mask.shape, dtype=torch.float64)
    for row, score in enumerate(batch.scores):
        (columns,) = mask[row].nonzero(as_tuple=True)
        rewards[row, columns] = -ppo._config.kl.coef * (batch.rollout.logprobs - reference)[row, columns].double()
        assert score.value is not None
        rewards[row, columns[-1]] += score.value
    return rewards


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.9, 0.0)])
@pytest.mark.parametrize("critic", ["with values", "without values"])
def test_i_ppo_4_advantages_are_the_sums_of_the_paper(
    architecture: Architecture, gamma: float, lam: float, critic: str, tmp_path: Path
) -> None:
    """A rollout's advantages are the float64 recursion's, at every limit of gamma, lambda and the values, to 1e-5."""
    config = replace(UNCLIPPED, gamma=gamma, lam=lam, kl=KLConfig(coef=0.2))
    ppo = make(tmp_path, architecture, config, moved=0.1)
    if critic == "without values":
        ppo._critic.head.requires_grad_(False).weight.zero_()
    batch = scored(ppo, config)
    experience, _ = ppo._prepare(batch)
    mask = batch.rollout.batch.loss_mask
    # A value belongs to the state that its token is drawn from: the token before it.
    values = torch.zeros(mask.shape)
    with torch.no_grad():
        values[:, 1:] = ppo._critic(batch.rollout.batch)[:, :-1]
    rewards = token_rewards(ppo, batch)
    assert torch.allclose(experience.old_values[mask], values[mask], rtol=0.0, atol=1e-5)
    advantages = torch.where(mask, experience.returns - experience.old_values, 0.0).double()
    want = by_the_paper(rewards, experience.old_values, mask, gamma, lam)
    assert np.allclose(advantages.numpy(), want, rtol=0.0, atol=1e-5)
    assert not experience.returns[~mask].any()

    to_come = rewards.flip(1).cumsum(1).flip(1)
    following = torch.nn.functional.pad(experience.old_values[:, 1:], (0, 1)) * torch.nn.functional.pad(mask[:, 1:], (0, 1))
    if gamma == lam == 1.0:
        assert torch.allclose(experience.returns.double()[mask], to_come[mask], rtol=0.0, atol=1e-5)
    if lam == 0.0:
        assert torch.allclose(advantages[mask], (rewards + gamma * following - experience.old_values)[mask], rtol=0.0, atol=1e-5)
    if critic == "without values":
        assert torch.equal(experience.returns.double(), advantages)
    # They are learnt from whitened, which moves and scales them and nothing else.
    whitened = advantages[mask] - advantages[mask].mean()
    assert torch.allclose(experience.advantages[mask].double(), whitened / whitened.square().mean().sqrt(), rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_ppo_5_advantages_are_whitened_over_the_response_tokens_alone(architecture: Architecture, tmp_path: Path) -> None:
    """Advantages have mean 0 and biased variance 1 over the mask, to 1e-5, whatever garbage stands outside, to the last bit."""
    ppo = make(tmp_path, architecture, moved=0.1)
    batch = scored(ppo)
    experience, _ = ppo._prepare(batch)
    counted = experience.advantages[experience.mask].double()
    assert abs(float(counted.mean())) < 1e-5
    assert float(counted.square().mean()) == pytest.approx(1.0, abs=1e-5)
    assert not experience.advantages[~experience.mask].any()
    for garbage in GARBAGE:
        spoiled, _ = ppo._prepare(padded(batch, garbage, columns=0))
        assert torch.equal(spoiled.advantages, experience.advantages)
        assert torch.equal(spoiled.returns, experience.returns)


def masked_functions() -> Iterator[Any]:
    """Every public function of the tensor maths that takes a mask, with every choice among its options."""
    choices: dict[str, list[Any]] = {"clip": [0.2], "coef": [0.1], "gamma": [0.99], "lam": [0.95], "low": [0.5], "high": [2.0]}
    for found in pkgutil.iter_modules(ops.__path__):
        module = importlib.import_module(f"alignkit.ops.{found.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            parameters = inspect.signature(function).parameters
            if function.__module__ != module.__name__ or name.startswith("_") or "mask" not in parameters:
                continue
            options: dict[str, list[Any]] = {}
            for option, parameter in parameters.items():
                if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not option.startswith("tokens_in_"):
                    known = [True, False] if parameter.annotation == "bool" else choices.get(option, [parameter.default])
                    assert inspect.Parameter.empty not in known, f"{module.__name__}.{name}: say here what {option} may be"
                    options[option] = [*known, *([None] if "None" in str(parameter.annotation) else [])]
            for chosen in itertools.product(*options.values()):
                settings_of = dict(zip(options, chosen, strict=True))
                shown = ",".join(f"{option}={value}" for option, value in settings_of.items())
                yield pytest.param(function, settings_of, id=f"{found.name}.{name}({shown})")


@pytest.mark.parametrize(("function", "options"), list(masked_functions()))
@given(batch=ragged(), garbage=st.sampled_from(GARBAGE))
@settings(max_examples=12)
def test_i_ppo_6_no_masked_cell_changes_a_bit(function: Any, options: dict[str, Any], batch: Ragged, garbage: float) -> None:
    """What stands at masked cells, and more padding on the right, changes no bit of any figure, and gets a gradient of exactly 0."""
    parameters = list(inspect.signature(function).parameters.values())
    positional = [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    numbers = dict(zip(positional, batch.numbers(len(positional), torch.float32), strict=True))
    count = {p.name: int(batch.mask.sum()) for p in parameters if p.name.startswith("tokens_in_")}
    columns = batch.mask.shape[1]

    def computed(prepare: Callable[[Tensor], Tensor], mask: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Its figures, and the slope of a sum over them in each of its inputs [b t]."""
        # A score is one number a row; everything else has a number for each token.
        inputs = {name: x[:, 0].clone() if name == "scores" else prepare(x).requires_grad_() for name, x in numbers.items()}
        returned = function(*(mask if name == "mask" else inputs[name] for name in positional), **options, **count)
        figures = list(returned) if isinstance(returned, tuple) else [returned]
        wanting = [x for name, x in inputs.items() if x.requires_grad and name != "mask"]
        # Figures of ``ops.stats`` are there to be read: nothing learns from them.
        learnt = function.__module__ != "alignkit.ops.stats"
        sloping = [figure.sin().sum() for figure in figures if figure.requires_grad and learnt]
        slopes = torch.autograd.grad(sum(sloping[1:], sloping[0]), wanting, allow_unused=True) if sloping else ()
        return figures, [slope for slope in slopes if slope is not None]

    def narrow(figure: Tensor) -> Tensor:
        """Without the columns that are there only as padding, which hold zeros."""
        if figure.ndim < 2:
            return figure
        assert not figure[:, columns:].any()
        return figure[:, :columns]

    want, slopes = computed(lambda x: torch.where(batch.mask, x, 0.0), batch.mask)
    spoiled = computed(lambda x: batch.spoil(x, garbage), batch.mask)
    wide = computed(lambda x: batch.widen(batch.spoil(x, garbage), garbage), batch.widen(batch.mask, False))
    for figures, its_slopes in (spoiled, wide):
        for ours, theirs in zip(figures, want, strict=True):
            assert torch.equal(narrow(ours), theirs)
            assert theirs.ndim < 2 or not theirs[~batch.mask].any()
        for ours, theirs in zip(its_slopes, slopes, strict=True):
            assert not narrow(ours)[~batch.mask].any()
            assert torch.allclose(narrow(ours), theirs, rtol=1e-5, atol=1e-5 * (1.0 + float(theirs.abs().max())))


EVERYTHING = replace(
    UNCLIPPED, epochs=2, entropy_coef=0.01, whiten_rewards=True, missing_eos_penalty=0.5, correction=CorrectionConfig(kind="sequence_mask"),
    kl=KLConfig(kind="adaptive"), critic=replace(UNCLIPPED.critic, clip=0.2),
)  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("config", [UNCLIPPED, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("garbage", [math.nan, 1e9])
def test_i_ppo_6_padding_changes_no_bit_of_an_update(architecture: Architecture, config: PPOConfig, garbage: float, tmp_path: Path) -> None:
    """With more columns of padding, and garbage in every masked cell, an update has the same metrics and weights to the last bit."""
    narrow, wide = (make(tmp_path, architecture, config, moved=0.05) for _ in range(2))
    batch = scored(narrow, config)
    assert narrow.update(batch) == wide.update(padded(batch, garbage))
    assert same(weights(narrow), weights(wide))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_ppo_7_rewards_add_up_to_the_score_less_the_penalty(architecture: Architecture, tmp_path: Path) -> None:
    """The sum of a response's token rewards is its score less coef times its KL, to 1e-5, and there is none outside of it."""
    config = replace(UNCLIPPED, gamma=1.0, lam=1.0, kl=KLConfig(coef=0.3))
    ppo = make(tmp_path, architecture, config, moved=0.1)
    # Without values, discount or lambda a return is the sum of the rewards to come.
    ppo._critic.head.requires_grad_(False).weight.zero_()
    batch = scored(ppo, config)
    experience, metrics = ppo._prepare(batch)
    apart = torch.where(experience.mask, batch.rollout.logprobs - reference_logprobs(ppo, batch), 0.0).double()
    scores = torch.tensor([score.value for score in batch.scores], dtype=torch.float64)
    totals = []
    for row, counts in enumerate(experience.mask):
        to_come = experience.returns[row, counts].double()
        totals.append(float(to_come[0]))
        assert totals[-1] == pytest.approx(float(scores[row] - 0.3 * apart[row].sum()), abs=1e-5)
        # Token by token: the penalty alone, and the score with the last.
        assert torch.allclose(to_come[:-1] - to_come[1:], -0.3 * apart[row, counts][:-1], rtol=0.0, atol=1e-5)
        assert float(to_come[-1]) == pytest.approx(float(scores[row] - 0.3 * apart[row, counts][-1]), abs=1e-5)
    assert not experience.returns[~experience.mask].any()
    assert metrics["reward/total_mean"] == pytest.approx(sum(totals) / len(totals), abs=1e-5)
    assert float(apart.abs().mean()) > 0.05  # there was something to penalise


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_ppo_8_a_step_does_not_depend_on_the_microbatch_size(architecture: Architecture, tmp_path: Path) -> None:
    """A minibatch of 8 responses, 1 to 8 of them at once: the same gradients of policy and critic, to 1e-5, and the same figures."""
    config = replace(ONE_STEP, entropy_coef=0.1, critic=replace(ONE_STEP.critic, clip=0.2))
    whole = make(tmp_path, architecture, config)
    experience, _ = whole._prepare(scored(whole, config))
    widest = int(experience.batch.mask.sum(dim=1).max())

    def step(rows_at_once: int) -> tuple[list[dict[str, Tensor]], dict[str, float], int]:
        tokens = rows_at_once * widest
        split = replace(config, microbatch_tokens=tokens, critic=replace(config.critic, microbatch_tokens=tokens))
        # It has moved since the rollout, so that some ratios are clipped and others are not.
        ppo = make(tmp_path, architecture, split, moved=0.05)
        forwards: list[None] = []
        ppo._policy.module.base_model.register_forward_hook(lambda *_: forwards.append(None))
        figures = ppo._policy_step(experience, check=False, exact=True) | ppo._critic_step(experience)
        return [first_gradient(ppo.state(), learner) for learner in ("policy/", "critic/")], figures, len(forwards)

    gradients, figures, forwards = step(8)
    assert forwards == 1
    assert 0.0 < figures["policy/clip_share"] < 1.0
    assert figures["policy/approx_kl_nats"] > 1e-3
    for rows_at_once in range(1, 8):
        ours, others, forwards = step(rows_at_once)
        assert forwards > 1
        assert others == pytest.approx(figures, rel=1e-5, abs=1e-6)
        for found, wanted in zip(ours, gradients, strict=True):
            assert relative_distance(found, wanted) < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_ppo_8_two_halves_with_the_counts_of_the_whole_are_one_step(architecture: Architecture, tmp_path: Path) -> None:
    """What two ranks would hand in, each over the global count, adds up to the gradient of one, to 1e-5 of its length."""
    ppo = make(tmp_path, architecture, ONE_STEP, moved=0.05)
    experience, _ = ppo._prepare(scored(ppo, ONE_STEP))
    # The short responses on the first rank, the long ones on the second: a mean of their means would be another gradient.
    by_length = experience.mask.sum(dim=1).argsort().tolist()
    halves = [experience.rows(by_length[:4]), experience.rows(by_length[4:])]
    counts = [int(half.mask.sum()) for half in halves]
    assert counts[0] < counts[1]

    def gradients(parts: list[Experience], denominators: list[float]) -> list[dict[str, Tensor]]:
        fresh = make(tmp_path, architecture, ONE_STEP, moved=0.05)

        def policy(part: Experience, count: float) -> tuple[Tensor, Metrics]:
            logprobs = fresh._policy.score_tokens(part.batch).logprobs
            return clipped_policy_loss(logprobs, part.old_logprobs, part.advantages, part.mask, clip=0.2, tokens_in_minibatch=count), {}

        def critic(part: Experience, count: float) -> tuple[Tensor, Metrics]:
            values = fresh._critic.values(part.batch)
            return clipped_value_loss(values, part.old_values, part.returns, part.mask, clip=None, tokens_in_minibatch=count), {}

        given_in = list(zip(parts, denominators, strict=True))
        fresh._policy_learner.step(lambda tokens: [lambda p=p, n=n: policy(p, n) for p, n in given_in])
        fresh._critic_learner.step(lambda tokens: [lambda p=p, n=n: critic(p, n) for p, n in given_in])
        return [first_gradient(fresh.state(), learner) for learner in ("policy/", "critic/")]

    everything = sum(counts)
    one, two = gradients([experience], [everything]), gradients(halves, [everything, everything])
    careless = gradients(halves, [2 * count for count in counts])
    for i in range(2):
        assert relative_distance(two[i], one[i]) < 1e-5
        assert relative_distance(careless[i], one[i]) > 1e-2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_ppo_9_there_are_as_many_steps_as_epochs_times_minibatches(architecture: Architecture, tmp_path: Path) -> None:
    """3 epochs of 3 minibatches of 7 responses, one a microbatch: 9 steps an iteration, counted by AdamW itself for each weight."""
    config = replace(
        UNCLIPPED, prompts=7, samples_per_prompt=1, epochs=3, minibatches=3, microbatch_tokens=1, critic=CriticConfig(microbatch_tokens=1)
    )
    ppo = make(tmp_path, architecture, config)
    for iteration in range(2):
        metrics = ppo.update(scored(ppo, config, step=iteration))
        assert metrics["policy/steps_count"] == 9
        counts = {name: float(tensor) for name, tensor in ppo.state().tensors.items() if "adam.step/" in name}
        assert {name.split("/")[0] for name in counts} == {"policy", "critic"}
        assert set(counts.values()) == {9 * (iteration + 1)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_ppo_10_each_response_is_visited_once_an_epoch_with_its_own_figures(
    architecture: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every epoch visits every response once, in another order, and dealing them out leaves each one's figures as they are."""
    config = replace(UNCLIPPED, epochs=3, minibatches=3)
    ppo = make(tmp_path, architecture, config, moved=0.05)
    batch = scored(ppo, config)
    experience, _ = ppo._prepare(batch)

    def figures(part: Experience, row: int) -> tuple[tuple[float, ...], ...]:
        there = part.batch.mask[row]
        columns = (part.batch.ids, part.mask, part.old_logprobs, part.old_values, part.advantages, part.returns)
        return tuple(tuple(x[row][there].tolist()) for x in columns)

    dealt = list(ppo._minibatches(8))
    epochs = [list(itertools.chain(*dealt[i : i + 3])) for i in (0, 3, 6)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(8))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    for index in dealt:
        part = experience.rows(index)
        for row, i in enumerate(index):
            assert figures(part, row) == figures(experience, i)
        for small in part.microbatches(16):
            assert all(figures(small, row) in [figures(experience, i) for i in index] for row in range(len(small)))

    # And that is what the update learns from.
    seen: list[tuple[int, ...]] = []
    plainly = CausalPolicy.score_tokens

    def watched(self: CausalPolicy, part: TokenBatch, **options: Any) -> Any:
        if self is ppo.policy:
            seen.extend(tuple(ids[mask].tolist()) for ids, mask in zip(part.ids, part.mask, strict=True))
        return plainly(self, part, **options)

    monkeypatch.setattr(CausalPolicy, "score_tokens", watched)
    ppo.update(batch)
    drawn = Counter(tuple(ids[mask].tolist()) for ids, mask in zip(experience.batch.ids, experience.batch.mask, strict=True))
    assert [Counter(seen[i : i + 8]) for i in (0, 8, 16)] == [drawn] * 3
    assert len(seen) == 24


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_ppo_11_a_token_that_moved_far_enough_is_left_alone(architecture: Architecture, tmp_path: Path) -> None:
    """Above 1 + clip with A > 0, and below 1 - clip with A < 0, no weight has a gradient; on the other two sides it does."""
    ppo = make(tmp_path, architecture)
    batch = scored(ppo).rollout.batch
    for advantage, ratio in itertools.product((1.0, -1.0), (1.3, 0.7, 1.1, 0.9)):
        logprobs = ppo._policy.score_tokens(batch).logprobs
        terms = (logprobs.detach() - math.log(ratio), torch.full_like(logprobs, advantage).detach(), batch.loss_mask)
        count = int(batch.loss_mask.sum())
        loss = clipped_policy_loss(logprobs, *terms, clip=0.2, tokens_in_minibatch=count)
        gradient = gradient_of(loss, ppo._policy.module)
        held = (advantage, ratio) in {(1.0, 1.3), (-1.0, 0.7)}
        assert all(not slope.any() for slope in gradient.values()) == held
        assert float(clipped_share(logprobs.detach(), *terms, clip=0.2, tokens_in_minibatch=count)) == held


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_ppo_12_reference_and_reward_model_stay_as_they_are(architecture: Architecture, tmp_path: Path) -> None:
    """Two iterations of training change no bit of the reference and of the reward model that scores them."""
    ppo = make(tmp_path, architecture)
    reward = ppo._context.load_scalar(None, False)
    source = TrainedReward(reward, checks=True)
    frozen = [ppo._reference.module, reward]
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in frozen]
    trained = weights(ppo)
    for step in range(2):
        rollout = scored(ppo, step=step).rollout
        ppo.update(ScoredRollout(rollout, tuple(source.score(rollout.samples))))
    for model, kept in zip(frozen, before, strict=True):
        assert same(dict(model.state_dict()), kept)
        assert all(weight.grad is None and not weight.requires_grad for weight in model.parameters())
    after = weights(ppo)
    for part in ("policy/", "critic/"):
        assert any(not torch.equal(after[name], trained[name]) for name in trained if name.startswith(part))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_ppo_12_what_the_critic_learns_does_not_reach_the_policy(architecture: Architecture, tmp_path: Path) -> None:
    """Policy and critic share no weight, the critic's loss has no gradient in the policy, and its learning rate does not move it."""
    ppo, fast = make(tmp_path, architecture), make(tmp_path, architecture, replace(UNCLIPPED, critic=CriticConfig(learning_rate=0.1)))
    batch = scored(ppo)
    storage = {weight.data_ptr() for weight in ppo._policy.module.parameters()}
    assert not storage & {weight.data_ptr() for weight in ppo._critic.parameters()}
    assert not storage & {weight.data_ptr() for weight in ppo._reference.module.parameters()}

    ppo._critic.values(batch.rollout.batch).square().sum().backward()
    assert all(weight.grad is None for weight in ppo._policy.module.parameters())
    assert all(weight.grad is not None for weight in ppo._critic.head.parameters())
    ppo._critic.zero_grad()

    ppo.update(batch)
    fast.update(batch)
    assert same(weights(ppo, "policy/"), weights(fast, "policy/"))
    assert not same(weights(ppo, "critic/"), weights(fast, "critic/"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_ppo_13_the_controller_moves_by_its_rule(architecture: Architecture, tmp_path: Path) -> None:
    """KL at its target leaves the coefficient, and from 1.2 times the target on it grows by exactly 1 + 0.2 n / horizon, to 1e-12."""
    measured = make(tmp_path, architecture, moved=0.1)
    batch = scored(measured)
    _, metrics = measured._prepare(batch)
    kl = metrics["kl/sequence_nats"]
    assert kl > 0.1

    def coefficient(target: float) -> float:
        config = replace(UNCLIPPED, kl=KLConfig(kind="adaptive", coef=0.15, target=target, horizon=400.0))
        ppo = make(tmp_path, architecture, config, moved=0.1)
        assert ppo.update(batch)["kl/coef"] == 0.15  # the rewards of this iteration used the old one
        after: float = ppo.state().values["kl_coef"]
        return after

    # Eight responses of a horizon of 400.
    assert coefficient(kl) == pytest.approx(0.15, abs=1e-12)
    for much in (1.2, 1.5, 1e6):
        assert coefficient(kl / much) == pytest.approx(0.15 * (1 + 0.2 * 8 / 400), abs=1e-12)
    assert coefficient(kl / 1.1) == pytest.approx(0.15 * (1 + 0.1 * 8 / 400), abs=1e-12)
    assert coefficient(kl / 0.5) == pytest.approx(0.15 * (1 - 0.2 * 8 / 400), abs=1e-12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_ppo_14_a_response_ends_with_its_first_stop_token_or_pays(architecture: Architecture, tmp_path: Path) -> None:
    """The mask ends with the first stop token, be it the first token or none; one that never stops is fined exactly once."""
    free, fined = make(tmp_path, architecture), make(tmp_path, architecture, replace(UNCLIPPED, missing_eos_penalty=0.75))

    def responses(stop_ids: tuple[int, ...]) -> tuple[ScoredRollout, list[list[int]]]:
        free._policy.codec.stop_ids = stop_ids
        batch = scored(free, score=lambda sample: 2.5)
        tokens = batch.rollout.batch
        return computed_anew(batch), [ids[mask].tolist() for ids, mask in zip(tokens.ids, tokens.loss_mask, strict=True)]

    # Without a stop token all are as long as they may be. With one, the same noise draws the same tokens up to it.
    endless, drawn = responses(())
    assert [len(tokens) for tokens in drawn] == [7] * 8
    assert not any(sample.finished for sample in endless.rollout.samples)
    first, middle, last = drawn[0][0], drawn[1][3], drawn[2][6]
    stopping, cut = responses((first, middle, last))

    def until(tokens: list[int]) -> int:
        return next((t + 1 for t, token in enumerate(tokens) if token in {first, middle, last}), 7)

    assert cut == [tokens[: until(tokens)] for tokens in drawn]
    assert len(cut[0]) == 1
    finished = [sample.finished for sample in stopping.rollout.samples]
    assert finished == [any(token in {first, middle, last} for token in tokens) for tokens in drawn]
    assert len(set(finished)) == 2

    for batch in (endless, stopping):
        for ppo, penalty in ((free, 0.0), (fined, 0.75)):
            ppo._config = replace(ppo._config, gamma=1.0, lam=1.0)
            ppo._critic.head.requires_grad_(False).weight.zero_()
            experience, metrics = ppo._prepare(batch)
            assert torch.equal(experience.mask, batch.rollout.batch.loss_mask)
            # There is no KL yet and there are no values: every token's return is what the response was given.
            for row, sample in enumerate(batch.rollout.samples):
                given_to = 2.5 if sample.finished else 2.5 - penalty
                assert set(experience.returns[row, experience.mask[row]].tolist()) == {given_to}
            fines = penalty * sum(not sample.finished for sample in batch.rollout.samples) / 8
            assert metrics["reward/total_mean"] == 2.5 - fines
            assert all(math.isfinite(value) for value in metrics.values())
    # A response of one token, and responses all of full length, can be learnt from.
    for batch in (endless, stopping):
        assert all(math.isfinite(value) for value in fined.update(batch).values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["tis", "icepop", "sequence_mask"])
def test_i_ppo_15_a_sampler_that_agrees_is_not_corrected(
    architecture: Architecture, kind: Literal["tis", "icepop", "sequence_mask"], tmp_path: Path
) -> None:
    """Where the sampler's log-probabilities are the trainer's, advantages, loss and weights are the uncorrected ones to the last bit."""
    config = replace(UNCLIPPED, correction=CorrectionConfig(kind=kind, low=0.9, high=1.1))
    plain, corrected, off = (make(tmp_path, architecture, each, moved=0.05) for each in (UNCLIPPED, config, config))
    batch = scored(plain)
    trained = plain._each(batch.rollout.batch, plain._logprobs)
    agreeing = replace(batch, rollout=replace(batch.rollout, logprobs=trained))
    first, second = plain._prepare(agreeing)[0], corrected._prepare(agreeing)[0]
    assert torch.equal(first.advantages, second.advantages)
    figures, others = plain.update(agreeing), corrected.update(agreeing)
    assert others.pop("rollout/mismatch_nats") == 0.0
    assert others == figures
    assert same(weights(plain), weights(corrected))
    # One that is half a nat off is.
    wrong = replace(batch, rollout=replace(batch.rollout, logprobs=trained - 0.5 * batch.rollout.batch.loss_mask))
    assert not torch.equal(off._prepare(wrong)[0].advantages, first.advantages)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_ppo_16_pretraining_text_adds_its_gradient_before_the_step(architecture: Architecture, tmp_path: Path) -> None:
    """The policy's gradient is PPO's plus coef times the text's, to 1e-5 of its length; coef 0 is PPO, and the critic's is the same."""
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": "plain text " * (i % 3 + 1) + str(i)}) + "\n" for i in range(9)), encoding="utf-8")
    data: Component[Any] = Component("jsonl", FileConfig(path=str(file)))
    # The text is learnt at temperature 1 whatever the responses are drawn at.
    config = replace(ONE_STEP, temperature=0.7)
    plain = make(tmp_path, architecture, config, moved=0.05)
    batch = scored(plain, config)
    plain.update(batch)
    alone, critic = (first_gradient(plain.state(), learner) for learner in ("policy/", "critic/"))

    def mixed(coef: float) -> PPO:
        return make(tmp_path, architecture, replace(config, ptx=PtxConfig(data=data, coef=coef, ratio=2, max_length=20)), moved=0.05)

    nothing, much, apart = mixed(0.0), mixed(3.0), mixed(3.0)
    nothing.update(batch)
    much.update(batch)
    assert apart._pretraining is not None
    text = collate(apart._pretraining.take(2 * 8))
    nll = -apart._policy.score_tokens(text).logprobs[text.loss_mask].mean()
    of_text = gradient_of(nll, apart._policy.module)
    assert relative_distance(first_gradient(nothing.state(), "policy/"), alone) < 1e-5
    want = {name: alone[name] + 3.0 * of_text[name] for name in alone}
    assert relative_distance(first_gradient(much.state(), "policy/"), want) < 1e-5
    assert relative_distance(alone, want) > 0.1
    assert same(first_gradient(much.state(), "critic/"), critic)
    assert {float(steps) for name, steps in much.state().tensors.items() if "adam.step/" in name} == {1.0}


def learn(folder: Path, architecture: Architecture, coef: float) -> list[Metrics]:
    """PPO for 20 iterations; the reward is how often a response says the letter that the untrained policy says most often."""
    config = PPOConfig(
        iterations=20, prompts=4, samples_per_prompt=20, max_new_tokens=6, minibatches=1, learning_rate=7e-4, warmup=0.1, decay="constant",
        kl=KLConfig(coef=coef), critic=CriticConfig(learning_rate=5e-3, decay="constant"),
    )  # fmt: skip
    ppo = PPO(config, vivid_context(folder, architecture, plan(config, 100)))
    before = [scored(ppo, config, step).rollout for step in range(1000, 1006)]
    said = Counter(character for rollout in before for sample in rollout.samples for character in sample.response)
    letter = max((character for character in said if character.isascii() and character.isalpha()), key=lambda c: (said[c], c))
    return [ppo.update(scored(ppo, config, step, lambda sample: float(sample.response.count(letter)))) for step in range(20)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_ppo_17_what_is_rewarded_is_learnt(architecture: Architecture, tmp_path: Path) -> None:
    """Rewarded for one token, the mean reward rises above three times its start in 20 iterations, and the KL stays finite."""
    figures = learn(tmp_path, architecture, coef=0.01)
    start = figures[0]["reward/score_mean"]
    assert 0.0 < start < 0.3
    assert figures[-1]["reward/score_mean"] > 3.0 * start
    assert all(math.isfinite(step["kl/sequence_nats"]) for step in figures)
    assert figures[-1]["kl/sequence_nats"] > 1.0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_ppo_17_a_strong_penalty_holds_it_back(architecture: Architecture, tmp_path: Path) -> None:
    """With a KL coefficient of 100 the KL stays below 0.1 nats a response, and the mean reward below three times its start."""
    figures = learn(tmp_path, architecture, coef=100.0)
    assert max(step["kl/sequence_nats"] for step in figures) < 0.1
    assert figures[-1]["reward/score_mean"] < 3.0 * figures[0]["reward/score_mean"]
