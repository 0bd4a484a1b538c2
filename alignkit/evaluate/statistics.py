"""The figures of a comparison: pure functions of numpy arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def outcomes(before: Floats, after: Floats) -> Floats:
    """1 where ``after`` [n] beats ``before`` [n], 0 where it loses, 0.5 at a tie; nan where either is nan."""
    return np.where(np.isnan(before) | np.isnan(after), np.nan, (np.sign(after - before) + 1.0) / 2.0)


def per_group(values: Floats, groups: Sequence[str]) -> Floats:
    """The mean of each group's values that are not nan; groups that have none are left out. In order of first appearance."""
    members: dict[str, list[float]] = {}
    for value, group in zip(values.tolist(), groups, strict=True):
        if not np.isnan(value):
            members.setdefault(group, []).append(value)
    return np.array([sum(found) / len(found) for found in members.values()])


def bootstrap_interval(
    values: Floats, *, resamples: int, seed: int, weights: Floats | None = None, level: float = 0.95
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of ``values`` [n], weighted by ``weights`` [n] (Efron 1979); nan when there are none.

    Responses to one prompt are not independent, nor are tokens of one document: give it one value a prompt, or a document's mean
    with its number of tokens as the weight.
    """
    if not len(values):
        return float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    draws = (generator.integers(len(values), size=len(values)) for _ in range(resamples))
    means = np.array([np.average(values[drawn], weights=None if weights is None else weights[drawn]) for drawn in draws])
    low, high = np.quantile(means, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)


def pair_agreement(scores: Floats, ratings: Floats, *, at_least: float) -> tuple[float, int]:
    """How often ``scores`` [n] order two items as ``ratings`` [n] do, of the pairs whose ratings differ by ``at_least`` or more.

    A tie of scores counts half. Returns the share (nan without pairs) and the number of pairs; items whose score is nan are left out.
    """
    known = ~np.isnan(scores)
    scores, ratings = scores[known], ratings[known]
    difference = ratings[:, None] - ratings[None, :]
    pairs = difference >= at_least
    count = int(pairs.sum())
    right = (np.sign(scores[:, None] - scores[None, :]) + 1.0) / 2.0
    return (float(right[pairs].mean()) if count else float("nan")), count


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Different word n-grams over all word n-grams of ``texts`` (Li et al. 2016); nan when there are none. It falls as texts repeat."""
    grams = [tuple(words[i : i + n]) for words in (text.lower().split() for text in texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def without_nan(figures: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no nan: what could not be computed becomes None."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in figures.items()}
