"""The comparison of two policies: its statistics by hand, and the whole evaluator on fakes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from alignkit.errors import DataError
from alignkit.evaluate import WinRateConfig
from alignkit.evaluate.statistics import bootstrap_interval, distinct, outcomes, pair_agreement, per_group
from alignkit.evaluate.win_rate import WinRate, rated_samples, sequence_kl
from alignkit.interfaces import Policy, Rollout, Row, TokenBatch, TokenScores
from alignkit.settings import Component
from alignkit.types import Prompt, PromptRow, Sample, Sampling, Score
from tests.fakes import tiny_policy

NAN = math.nan


def test_a_win_is_one_a_tie_half_and_no_verdict_is_nan() -> None:
    found = outcomes(np.array([1.0, 1.0, 1.0, NAN, 1.0]), np.array([2.0, 0.0, 1.0, 1.0, NAN]))
    assert found[:3].tolist() == [1.0, 0.0, 0.5]
    assert np.isnan(found[3:]).all()


def test_a_prompt_is_the_mean_of_its_known_samples() -> None:
    assert per_group(np.array([1.0, 0.0, NAN, 1.0, NAN]), ["a", "a", "b", "c", "c"]).tolist() == [0.5, 1.0]


def test_the_interval_of_equal_values_is_that_value_and_of_none_is_nan() -> None:
    assert bootstrap_interval(np.full(5, 0.25), resamples=10, seed=0) == (0.25, 0.25)
    assert np.isnan(bootstrap_interval(np.array([]), resamples=10, seed=0)).all()


def test_the_interval_is_near_the_normal_one_and_the_seed_makes_it() -> None:
    wins = np.array([1.0] * 75 + [0.0] * 25)
    low, high = bootstrap_interval(wins, resamples=4000, seed=1)
    margin = 1.96 * math.sqrt(0.75 * 0.25 / 100)  # 0.085
    assert (low, high) == (pytest.approx(0.75 - margin, abs=0.015), pytest.approx(0.75 + margin, abs=0.015))
    assert bootstrap_interval(wins, resamples=4000, seed=1) == (low, high)


def test_a_weight_says_how_much_of_the_mean_a_value_is() -> None:
    # Two draws of two: the 0 twice, the 1 twice, or half the time one of each, with the mean 3/4. The last is the median.
    values, weights = np.array([0.0, 1.0]), np.array([1.0, 3.0])
    assert bootstrap_interval(values, resamples=200, seed=0, weights=weights, level=0.0) == (0.75, 0.75)
    assert bootstrap_interval(values, resamples=200, seed=0, weights=weights) == (0.0, 1.0)
    draws = np.array([0.5, 0.25, 1.0])
    assert bootstrap_interval(draws, resamples=9, seed=3, weights=np.full(3, 7.0)) == pytest.approx(
        bootstrap_interval(draws, resamples=9, seed=3)
    )


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    draws = generator.normal(loc=0.3, size=(400, 60))
    held = [low <= 0.3 <= high for low, high in (bootstrap_interval(values, resamples=200, seed=i) for i, values in enumerate(draws))]
    assert 0.91 < np.mean(held) < 0.98


def test_agreement_counts_only_pairs_that_people_tell_apart() -> None:
    ratings = np.array([3.0, 1.0, 0.5, 9.0])
    scores = np.array([0.9, 0.2, 0.9, NAN])
    # (3, 1): right. (3, 0.5): a tie, half. (1, 0.5): too close. The last has no score.
    assert pair_agreement(scores, ratings, at_least=1.0) == (0.75, 2)


def test_distinct_falls_as_texts_repeat() -> None:
    assert distinct(["a fine film", "A fine mess"]) == pytest.approx(3 / 4)  # a-fine, fine-film, fine-mess of four
    assert math.isnan(distinct(["one"]))


class FakeCodec:
    """Token ids are characters; 0 ends a response."""

    stop_ids = (0,)
    template_hash = "none"

    def prompt(self, prompt: Prompt) -> tuple[int, ...]:
        return tuple(ord(c) for c in prompt.messages[-1].content)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids if i)


class FakePolicy:
    """Every token has the same log-probability. It has what an evaluation may use of a policy, and nothing else."""

    codec = FakeCodec()
    version = 0

    def __init__(self, says: dict[str, str], logprob: float) -> None:
        self.says = says
        self._logprob = logprob

    def score_tokens(self, batch: TokenBatch, *, temperature: float = 1.0) -> TokenScores:
        logprobs = self._logprob * batch.loss_mask.float()
        return TokenScores(logprobs, logprobs)


class FakeEngine:
    """Answers with what the policy says to the prompt, ended by the stop token."""

    def rollout(self, policy: Policy, prompts: Sequence[PromptRow], sampling: Sampling, *, samples_per_prompt: int, step: int) -> Rollout:
        assert isinstance(policy, FakePolicy)
        samples = tuple(Sample(row.prompt, policy.says[row.prompt.id], finished=policy.says[row.prompt.id] != "") for row in prompts)
        lengths = [len(sample.response) + 1 for sample in samples]
        mask = torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]
        batch = TokenBatch(mask.long(), mask, mask)
        return Rollout(samples, batch, torch.zeros(mask.shape), exact=True, policy_version=0)


class LengthJudge:
    """Longer is better; silence has no verdict."""

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        return [Score(float(len(s.response))) if s.response else Score(None, reason="silence") for s in samples]


def row(identity: str, **values: Any) -> Row:
    return Row({"id": identity, "prompt": f"p{identity}", **values}, f"data.jsonl:{identity}")


PROMPTS = [row("1"), row("2"), row("3"), row("4")]
RATED = [row("8", response="long", rating=2.0), row("9", response="no", rating=-1)]
CONFIG = WinRateConfig(
    candidate="ppo",
    baseline="sft",
    judge=Component("length", None),
    prompts=Component("rows", PROMPTS),
    judge_data=Component("rows", RATED),
    bootstrap=50,
    examples=2,
)


def evaluator(config: WinRateConfig) -> WinRate:
    policies = {
        "sft": FakePolicy({"1": "ab", "2": "abc", "3": "a", "4": ""}, logprob=-2.0),
        "ppo": FakePolicy({"1": "abcd", "2": "abc", "3": "abc", "4": "abc"}, logprob=-1.5),
    }
    context: Any = SimpleNamespace(
        seed=0,
        load_policy=lambda stage, trainable: policies[stage],
        build_reward=lambda component: LengthJudge(),
        build_data=lambda component: SimpleNamespace(rows=lambda: component.config),
        say=lambda text: None,
    )
    return WinRate(config, context, engine=FakeEngine())


def test_the_evaluation_of_two_fakes_is_as_worked_out_by_hand() -> None:
    figures = evaluator(CONFIG).evaluate()
    # Pairs 1 and 3 are won by two letters each, pair 2 is a tie, pair 4 has no score before.
    assert figures["win_rate"] == pytest.approx(2.5 / 3)
    assert 0.5 <= figures["ci95_low"] <= figures["win_rate"] <= figures["ci95_high"] <= 1.0
    assert (figures["judge_mean_before"], figures["judge_mean_after"]) == (pytest.approx(2.0), pytest.approx(10 / 3))
    assert figures["judge_gain"] == pytest.approx(4 / 3)
    assert (figures["prompts"], figures["pairs"], figures["unscored_before"], figures["unscored_after"]) == (4, 3, 1, 0)
    # 17 tokens, stop tokens included, each 0.5 nats likelier.
    assert figures["kl_sequence_nats"] == pytest.approx(0.5 * 17 / 4)
    assert figures["kl_token_nats"] == pytest.approx(0.5)
    assert (figures["response_length_tokens_before"], figures["response_length_tokens_after"]) == (2.5, 4.25)
    assert (figures["finished_share_before"], figures["finished_share_after"]) == (0.75, 1.0)
    assert (figures["judge_accuracy"], figures["judge_accuracy_pairs"]) == (1.0, 1)
    assert figures["examples"] == [
        {"prompt": "p1", "before": "ab", "after": "abcd", "score_before": 2.0, "score_after": 4.0},
        {"prompt": "p2", "before": "abc", "after": "abc", "score_before": 3.0, "score_after": 3.0},
    ]
    json.dumps(figures, allow_nan=False)


def test_a_policy_against_itself_ties_everywhere_at_no_distance() -> None:
    context: Any = SimpleNamespace(
        seed=3,
        load_policy=lambda stage, trainable: tiny_policy(trainable=trainable),
        build_reward=lambda component: LengthJudge(),
        build_data=lambda component: SimpleNamespace(rows=lambda: component.config),
        say=lambda text: None,
        guard=None,
    )
    figures = WinRate(replace(CONFIG, max_new_tokens=8, samples_per_prompt=2), context).evaluate()
    assert (figures["win_rate"], figures["ci95_low"], figures["ci95_high"]) == (0.5, 0.5, 0.5)
    assert figures["kl_sequence_nats"] == figures["judge_gain"] == 0.0
    assert figures["pairs"] + figures["unscored_before"] == 8
    assert [(example["prompt"], example["before"] == example["after"]) for example in figures["examples"]] == [("p1", True), ("p2", True)]


def test_without_ratings_the_judge_is_not_measured() -> None:
    assert "judge_accuracy" not in evaluator(replace(CONFIG, judge_data=None)).evaluate()


def test_a_rated_row_without_a_rating_is_named() -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:7: a row that measures a judge needs"):
        rated_samples([row("7", response="x")])


def test_kl_is_summed_over_the_masked_tokens_of_each_row() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    batch = TokenBatch(mask.long(), mask, torch.tensor([[False, True, False], [False, True, True]]))
    kl = sequence_kl(FakePolicy({}, -1.0), FakePolicy({}, -1.25), batch, temperature=1.0)
    assert kl.tolist() == pytest.approx([0.25, 0.5])


def test_the_declaration_is_light() -> None:
    code = "import sys, alignkit.evaluate; sys.exit(any(heavy in sys.modules for heavy in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
