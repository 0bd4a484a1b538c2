"""Before and after on the same prompts with the same noise: who wins, by how much, and how far the policy has gone for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from alignkit.data.encode import encode_prompts
from alignkit.data.records import prompts as read_prompts
from alignkit.errors import DataError
from alignkit.evaluate.statistics import Floats, bootstrap_interval, distinct, outcomes, pair_agreement, per_group, without_nan
from alignkit.interfaces import Policy, RewardSource, Rollout, RolloutEngine, TokenBatch
from alignkit.rollout import LocalEngine
from alignkit.types import PromptRow, Sample, Sampling

if TYPE_CHECKING:
    from alignkit.context import Context
    from alignkit.evaluate import WinRateConfig

NOISE_STEP = -1
"""The step that chooses the noise: none that any training step uses."""

ROWS_AT_ONCE = 32
RATING_DIFFERENCE = 1.0
"""Pairs of responses count for the judge's accuracy when people rated them this far apart."""


@dataclass(frozen=True, slots=True)
class Answers:
    """One policy's answers. ``scores`` [n] are the judge's, nan where it had no verdict; ``lengths`` [n] in tokens, stop token included."""

    samples: tuple[Sample, ...]
    scores: Floats
    lengths: Floats


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two policies' answers to the same prompts with the same noise, and the figures of ``evaluation.json``."""

    candidate: Policy
    before: Rollout
    after: Rollout
    figures: dict[str, Any]


class WinRate:
    """Compares the policies of two stages."""

    def __init__(self, config: WinRateConfig, context: Context, engine: RolloutEngine | None = None) -> None:
        self._config, self._context = config, context
        self._engine = engine or LocalEngine(context.seed + config.seed, context.guard)

    def evaluate(self) -> Mapping[str, Any]:
        """The figures, ready for ``evaluation.json``: a figure that cannot be computed is None."""
        return self.compare().figures

    def compare(self) -> Comparison:
        """Both policies' answers, judged, for whoever wants to measure more of them."""
        config, context = self._config, self._context
        baseline = context.load_policy(config.baseline, False)
        candidate = context.load_policy(config.candidate, False)
        judge = context.build_reward(config.judge)
        rows = list(context.build_data(config.prompts).rows())
        encoded = encode_prompts(candidate.codec, read_prompts(rows), max_length=config.max_length, overlong="error").rows

        before_name = config.baseline or "the policy that the run began with"
        context.say(f"{len(encoded)} prompts, {before_name} against {config.candidate}")
        before_rollout, after_rollout = self._draw(baseline, encoded), self._draw(candidate, encoded)
        before, after = judged(before_rollout, judge), judged(after_rollout, judge)
        kl = sequence_kl(candidate, baseline, after_rollout.batch, config.temperature)
        figures: dict[str, Any] = {
            "candidate": config.candidate,
            "baseline": before_name,
            "judge": config.judge.kind,
            "prompts": len(encoded),
            "samples_per_prompt": config.samples_per_prompt,
            **compare(before, after, resamples=config.bootstrap, seed=context.seed),
            "kl_sequence_nats": float(kl.mean()),
            "kl_token_nats": float(kl.sum() / after.lengths.sum()),
            **self._judge_accuracy(judge),
        }
        shown = config.examples * config.samples_per_prompt
        examples_shown = examples(before, after)[: shown : config.samples_per_prompt]
        return Comparison(candidate, before_rollout, after_rollout, without_nan(figures) | {"examples": examples_shown})

    def _draw(self, policy: Policy, prompts: Sequence[PromptRow]) -> Rollout:
        sampling = Sampling(max_new_tokens=self._config.max_new_tokens, temperature=self._config.temperature)
        return self._engine.rollout(policy, prompts, sampling, samples_per_prompt=self._config.samples_per_prompt, step=NOISE_STEP)

    def _judge_accuracy(self, judge: RewardSource) -> dict[str, Any]:
        if self._config.judge_data is None:
            return {}
        samples, ratings = rated_samples(self._context.build_data(self._config.judge_data).rows())
        accuracy, pairs = pair_agreement(values(judge, samples), ratings, at_least=RATING_DIFFERENCE)
        return {"judge_accuracy": accuracy, "judge_accuracy_pairs": pairs}


def judged(rollout: Rollout, judge: RewardSource) -> Answers:
    """A rollout with the judge's scores."""
    return Answers(rollout.samples, values(judge, rollout.samples), rollout.batch.loss_mask.sum(dim=1).cpu().numpy().astype(np.float64))


def values(judge: RewardSource, samples: Sequence[Sample]) -> Floats:
    """The judge's scores [n]; nan where it has no verdict."""
    return np.array([math.nan if score.value is None else score.value for score in judge.score(samples)], dtype=np.float64)


def compare(before: Answers, after: Answers, *, resamples: int, seed: int) -> dict[str, Any]:
    """Win rate, gain and the shape of the answers. A pair in which either answer has no score is left out, and counted."""
    groups = [sample.prompt.id for sample in before.samples]
    wins = per_group(outcomes(before.scores, after.scores), groups)
    gains = per_group(after.scores - before.scores, groups)
    both = ~np.isnan(before.scores) & ~np.isnan(after.scores)
    paired = [group for group, known in zip(groups, both, strict=True) if known]
    low, high = bootstrap_interval(wins, resamples=resamples, seed=seed)
    gain_low, gain_high = bootstrap_interval(gains, resamples=resamples, seed=seed)
    return {
        "win_rate": _mean(wins),
        "ci95_low": low,
        "ci95_high": high,
        "judge_mean_before": _mean(per_group(before.scores[both], paired)),
        "judge_mean_after": _mean(per_group(after.scores[both], paired)),
        "judge_gain": _mean(gains),
        "judge_gain_ci95_low": gain_low,
        "judge_gain_ci95_high": gain_high,
        "pairs": int(both.sum()),
        "unscored_before": int(np.isnan(before.scores).sum()),
        "unscored_after": int(np.isnan(after.scores).sum()),
        **_shape(before, "before"),
        **_shape(after, "after"),
    }


def examples(before: Answers, after: Answers) -> list[dict[str, Any]]:
    """Each pair as people read it; a score that is not there is None."""
    return [
        without_nan(
            {
                "prompt": "\n".join(message.content for message in old.prompt.messages),
                "before": old.response,
                "after": new.response,
                "score_before": float(old_score),
                "score_after": float(new_score),
            }
        )
        for old, new, old_score, new_score in zip(before.samples, after.samples, before.scores, after.scores, strict=True)
    ]


@torch.no_grad()
def sequence_kl(policy: Policy, reference: Policy, batch: TokenBatch, temperature: float) -> Floats:
    """Σ log policy - log reference [n] over the tokens of each of the policy's own samples, nats; its mean estimates the KL."""
    sums = []
    for start in range(0, len(batch.ids), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        width = int(batch.mask[rows].sum(dim=1).max())
        part = TokenBatch(batch.ids[rows, :width], batch.mask[rows, :width], batch.loss_mask[rows, :width])
        new, old = (which.score_tokens(part, temperature=temperature).logprobs for which in (policy, reference))
        sums.append((new - old).sum(dim=1).double().cpu())
    kl: Floats = torch.cat(sums).numpy()
    return kl


def rated_samples(rows: Any) -> tuple[list[Sample], Floats]:
    """Responses with people's ratings [n]. Raises ``DataError`` naming the row that lacks a ``response`` or a ``rating``."""
    rows = list(rows)
    samples, ratings = [], []
    for row, prompt in zip(rows, read_prompts(rows), strict=True):
        response, rating = row.values.get("response"), row.values.get("rating")
        if not isinstance(response, str) or isinstance(rating, bool) or not isinstance(rating, int | float):
            raise DataError(
                f"{row.origin}: a row that measures a judge needs `response`, a text, and `rating`, a number; found {sorted(row.values)}"
            )
        samples.append(Sample(prompt, response))
        ratings.append(float(rating))
    return samples, np.array(ratings, dtype=np.float64)


def _shape(answers: Answers, when: str) -> dict[str, float]:
    return {
        f"response_length_tokens_{when}": _mean(answers.lengths),
        f"finished_share_{when}": sum(sample.finished for sample in answers.samples) / len(answers.samples),
        f"distinct_2_{when}": distinct([sample.response for sample in answers.samples]),
    }


def _mean(numbers: Floats) -> float:
    return float(numbers.mean()) if len(numbers) else math.nan
