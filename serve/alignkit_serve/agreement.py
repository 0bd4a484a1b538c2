"""How far people agree: pure functions of numpy arrays.

A unit is what is judged: a pair of answers, whose values are worse, tie and better, or one answer, whose values are 1 to 7.
``counts`` [u c] says how many annotators gave unit u the value c; who did not judge it is simply not counted. Units of one item (a prompt)
are not independent of each other, so whatever is uncertain is drawn anew by items.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Statistic = Callable[[Floats], Floats]
"""Of sums [... k] over some items, the figures [...]; nan where it is not defined."""

Distance = Callable[[Floats], Floats]
"""Of how often each value was given [... c], how far the values are apart [... c c]."""

_RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Figure:
    """An estimate from ``items`` items, with its standard error and its 95 % interval."""

    value: float
    error: float
    low: float
    high: float
    items: int


def tally(units: Indices, values: Indices, shape: tuple[int, int]) -> Floats:
    """``counts`` [u c] from one entry a judgement [n]: of which unit, and which value."""
    return np.bincount(units * shape[1] + values, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)


def agreements(counts: Floats) -> Floats:
    """Of each unit's pairs of annotators, how many gave it one value, and how many there are [u 2].

    A tie agrees with a tie and with nothing else.
    """
    judged = counts.sum(-1)
    return np.stack([(counts * (counts - 1)).sum(-1) / 2, judged * (judged - 1) / 2], -1)


def coincidences(counts: Floats) -> Floats:
    """How often two values met in a unit [u c c]; a judgement counts once, however many it met (Krippendorff 2011, "Computing alpha")."""
    others = counts.sum(-1) - 1
    met = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(counts.shape[1])
    return met / np.where(others > 0, others, np.inf)[:, None, None]


def either_way(coincidences: Floats) -> Floats:
    """For the values of a pair [u c c]: the pair's answers have no order of their own, so each coincidence counts half either way round."""
    return (coincidences + coincidences[:, ::-1, ::-1]) / 2


def nominal(totals: Floats) -> Floats:
    """Values are equal or not."""
    return np.broadcast_to(1.0 - np.eye(totals.shape[-1]), (*totals.shape, totals.shape[-1]))


def ordinal(totals: Floats) -> Floats:
    """Values are as far apart as there are judgements between their middles."""
    middle = totals.cumsum(-1) - totals / 2
    return (middle[..., :, None] - middle[..., None, :]) ** 2


def alpha(coincidences: Floats, distance: Distance) -> Floats:
    """Krippendorff's alpha [...] from coincidences [... c c] summed over units: 1 is agreement, 0 is chance.

    nan without two different values: where nobody could disagree, nothing was learned about whether they would.
    """
    totals = coincidences.sum(-1)
    apart = distance(totals)
    observed = (coincidences * apart).sum((-2, -1))
    expected = (totals[..., :, None] * totals[..., None, :] * apart).sum((-2, -1))
    found: Floats = 1.0 - (totals.sum(-1) - 1.0) * ratio(observed, expected)
    return found


def ratio(above: Floats, below: Floats) -> Floats:
    """``above`` over ``below``; nan over nothing."""
    found: Floats = np.divide(above, below, out=np.full(np.broadcast(above, below).shape, np.nan), where=below > 0)
    return found


def share(sums: Floats) -> Floats:
    """The ``Statistic`` of sums [... 2] of hits and of trials."""
    return ratio(sums[..., 0], sums[..., 1])


def per_item(of_units: Floats, items: Indices) -> Floats:
    """Sums [i ...] of what units have [u ...], by their item [u]; items without any of it are left out."""
    sums = np.zeros((int(items.max(initial=-1)) + 1, *of_units.shape[1:]))
    np.add.at(sums, items, of_units)
    return sums[np.abs(sums).reshape(len(sums), int(np.prod(sums.shape[1:]))).any(-1)]


def estimate(sums: Floats, statistic: Statistic, *, seed: int = 0) -> Figure | None:
    """A statistic of all items' ``sums`` [i ...], with the percentile bootstrap over items (Efron 1979).

    None for fewer than two items, and where it is not defined.
    """
    value = float(statistic(sums.sum(0)))
    if len(sums) < 2 or math.isnan(value):
        return None
    generator = np.random.default_rng(seed)
    flat = sums.reshape(len(sums), -1)
    times = (np.bincount(generator.integers(len(sums), size=len(sums)), minlength=len(sums)) for _ in range(_RESAMPLES))
    drawn = statistic(np.stack([each @ flat for each in times]).reshape(_RESAMPLES, *sums.shape[1:]))
    drawn = drawn[~np.isnan(drawn)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Figure(value, float(drawn.std()), float(low), float(high), len(sums))


def tau_b(x: Floats, y: Floats) -> float:
    """Kendall's rank correlation of ranks [n] and [n], corrected for ties (Kendall 1945); nan where one of them ties everything."""
    first, second = (np.sign(ranks[:, None] - ranks[None, :]) for ranks in (x, y))
    scale = math.sqrt(float((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / scale if scale else math.nan


def majority_of_others(units: Indices, values: Indices, counts: Floats) -> Indices:
    """For each judgement [n] the value that most of the other annotators gave its unit; -1 where no single value is the most frequent."""
    others = counts[units]
    others[np.arange(len(units)), values] -= 1
    most = others.max(-1, initial=0.0)
    single = (most > 0) & ((others == most[:, None]).sum(-1) == 1)
    found: Indices = np.where(single, others.argmax(-1), -1)
    return found


def chance(count: int, probabilities: Floats) -> float:
    """The two-sided exact p-value of ``count`` successes in trials of ``probabilities`` [n], which may differ.

    The sum of what is no more likely than what was seen, under the Poisson binomial distribution; from its characteristic function
    (Hong 2013), which is exact to 1e-12.
    """
    trials = len(probabilities)
    turns: NDArray[Any] = np.exp(-2j * np.pi * np.arange(trials + 1) / (trials + 1))
    different, times = np.unique(probabilities, return_counts=True)
    characteristic = np.ones(trials + 1, dtype=np.complex128)
    for probability, often in zip(different, times, strict=True):
        characteristic *= (1 - probability + probability * turns) ** often
    mass = np.fft.ifft(characteristic).real.clip(min=0.0)
    return min(1.0, float(mass[mass <= mass[count] + 1e-12].sum()))
