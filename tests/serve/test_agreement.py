"""How far people agree: figures worked by hand, or printed in the papers they come from, and what must hold whoever judges."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations, product
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignkit_serve.agreement import (
    Floats,
    Indices,
    agreements,
    alpha,
    chance,
    coincidences,
    either_way,
    estimate,
    majority_of_others,
    nominal,
    ordinal,
    per_item,
    share,
    tally,
    tau_b,
)

N = math.nan
# Krippendorff 2011, "Computing Krippendorff's alpha-reliability", section C: four observers, twelve units.
FOUR_OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, N, N, N],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, N, 3],
    [N, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, N],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, N],
]


def counted(observers: list[list[float]], values: int) -> Floats:
    """Counts from a matrix with a row an observer; nan is not judged."""
    matrix = np.array(observers)
    who, units = np.nonzero(~np.isnan(matrix))
    return tally(units, matrix[who, units].astype(np.int64) - 1, (matrix.shape[1], values))


def interval(totals: Floats) -> Floats:
    values = np.arange(totals.shape[-1], dtype=np.float64)
    return (values[:, None] - values[None, :]) ** 2


@pytest.mark.parametrize(("distance", "printed"), [(nominal, 0.743), (ordinal, 0.815), (interval, 0.849)])
def test_alpha_is_krippendorffs(distance: Callable[[Floats], Floats], printed: float) -> None:
    found = alpha(coincidences(counted(FOUR_OBSERVERS, 5)).sum(0), distance)
    assert float(found) == pytest.approx(printed, abs=5e-4)


def test_alpha_of_two_observers_and_two_values() -> None:
    # Krippendorff 2011, section A: ten units, of which they differ in four; 6 of the 20 values are 1. Do = 8/20, De = 2*14*6/(20*19).
    meg = [1, 2, 1, 1, 1, 1, 1, 1, 1, 1]
    owen = [2, 2, 2, 1, 1, 2, 1, 2, 1, 1]
    assert float(alpha(coincidences(counted([meg, owen], 2)).sum(0), nominal)) == pytest.approx(1 - (8 / 20) / (168 / 380))


def test_alpha_of_one_value_only_is_not_defined() -> None:
    assert math.isnan(float(alpha(coincidences(counted([[1, 1], [1, 1]], 3)).sum(0), nominal)))


def test_alpha_of_pairs_does_not_depend_on_which_answer_is_named_first() -> None:
    # Twelve pairs judged by three; where the first answer happens to be the better one, plain alpha sees a value that all choose always.
    counts = np.array([[0, 0, 3], [0, 1, 2], [0, 0, 3], [1, 0, 2], [0, 0, 3], [0, 1, 2]], dtype=np.float64)
    turned = np.where(np.arange(6)[:, None] % 2 == 0, counts[:, ::-1], counts)
    one, other = (float(alpha(either_way(coincidences(each)).sum(0), nominal)) for each in (counts, turned))
    assert one == pytest.approx(other)
    assert float(alpha(coincidences(counts).sum(0), nominal)) < 0 < one


def test_agreement_counts_pairs_of_annotators_and_a_tie_agrees_with_a_tie() -> None:
    # Worse, tie, better. Three said better; two better and one tie; two ties; one alone.
    counts = np.array([[0, 0, 3], [0, 1, 2], [0, 2, 0], [1, 0, 0]], dtype=np.float64)
    assert agreements(counts).tolist() == [[3, 3], [1, 3], [1, 1], [0, 0]]
    figure = estimate(per_item(agreements(counts), np.array([0, 0, 1, 2])), share)
    assert figure is not None
    assert (figure.value, figure.items) == (5 / 7, 2)  # The third prompt has no two annotators.
    assert (figure.low, figure.high) == (4 / 6, 1.0)


def test_the_standard_error_is_that_of_the_mean() -> None:
    sums = np.array([[1.0, 1.0], [0.0, 1.0]] * 200)
    figure = estimate(sums, share)
    assert figure is not None
    assert figure.value == 0.5
    assert figure.error == pytest.approx(math.sqrt(0.25 / 400), rel=0.1)
    assert figure.high - figure.low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 400), rel=0.1)


@pytest.mark.parametrize("sums", [np.zeros((0, 2)), np.array([[1.0, 1.0]]), np.zeros((3, 2))])
def test_what_rests_on_too_little_is_no_figure(sums: Floats) -> None:
    assert estimate(sums, share) is None


def test_tau_b_by_hand() -> None:
    ranks = np.array([1.0, 2, 3, 4])
    assert tau_b(ranks, np.array([4.0, 3, 2, 1])) == -1
    # Of six pairs five in order and one not: (5 - 1) / 6.
    assert tau_b(ranks, np.array([1.0, 3, 2, 4])) == pytest.approx(4 / 6)
    # One tie: of the five other pairs all in order, 5 / sqrt(6 * 5).
    assert tau_b(ranks, np.array([1.0, 2, 2, 3])) == pytest.approx(5 / math.sqrt(30))
    # The example of scipy.stats.kendalltau's documentation.
    assert tau_b(np.array([12.0, 2, 1, 12, 2]), np.array([1.0, 4, 7, 1, 0])) == pytest.approx(-0.4714045207910316)
    assert math.isnan(tau_b(ranks, np.array([2.0, 2, 2, 2])))


def test_the_majority_of_the_others_leaves_oneself_out() -> None:
    # Unit 0: better, better, worse. Unit 1: better, worse. Unit 2: tie alone. Unit 3: better, better, worse, worse.
    units = np.array([0, 0, 0, 1, 1, 2, 3, 3, 3, 3])
    values = np.array([2, 2, 0, 2, 0, 1, 2, 2, 0, 0])
    found = majority_of_others(units, values, tally(units, values, (4, 3)))
    assert found.tolist() == [-1, -1, 2, 0, 2, -1, 0, 0, 2, 2]


def test_chance_of_a_coin_is_the_binomial_test() -> None:
    assert chance(8, np.full(10, 0.5)) == pytest.approx(2 * (45 + 10 + 1) / 1024)
    assert chance(5, np.full(10, 0.5)) == pytest.approx(1.0)
    assert chance(0, np.zeros(0)) == 1.0


def test_chance_of_different_trials_is_that_of_all_their_outcomes() -> None:
    probabilities = [0.5, 0.25, 0.25, 2 / 3, 1 / 9]
    mass = [0.0] * 6
    for outcome in product([0, 1], repeat=5):
        mass[sum(outcome)] += math.prod(p if hit else 1 - p for p, hit in zip(probabilities, outcome, strict=True))
    for count, likely in enumerate(mass):
        assert chance(count, np.array(probabilities)) == pytest.approx(sum(each for each in mass if each <= likely + 1e-12))


MATRICES = st.integers(2, 5).flatmap(
    lambda observers: st.lists(
        st.lists(st.sampled_from([1.0, 2.0, 3.0, N]), min_size=observers, max_size=observers), min_size=2, max_size=12
    )
)


@given(MATRICES, st.randoms())
def test_who_is_named_first_changes_nothing(units: list[list[float]], random: Random) -> None:
    shuffled = [random.sample(unit, len(unit)) for unit in units]
    for distance in (nominal, ordinal):
        one, other = (alpha(coincidences(counted(np.array(each).T.tolist(), 3)).sum(0), distance) for each in (units, shuffled))
        assert float(one) == pytest.approx(float(other), nan_ok=True)


@given(st.lists(st.integers(1, 7), min_size=2, max_size=20).filter(lambda values: len(set(values)) > 1), st.integers(2, 6))
def test_alpha_is_1_when_all_agree(values: list[int], observers: int) -> None:
    counts = counted([[float(value) for value in values]] * observers, 7)
    for distance in (nominal, ordinal):
        assert float(alpha(coincidences(counts).sum(0), distance)) == pytest.approx(1.0)
    assert float(share(agreements(counts).sum(0))) == 1.0


RANKS = st.lists(st.integers(1, 4), min_size=2, max_size=9)


@given(RANKS.filter(lambda ranks: len(set(ranks)) > 1))
def test_tau_of_a_ranking_with_itself_is_1(ranks: list[int]) -> None:
    x = np.array(ranks, dtype=np.float64)
    assert tau_b(x, x) == pytest.approx(1.0)
    assert tau_b(x, -x) == pytest.approx(-1.0)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=2, max_size=9))
def test_tau_counts_pairs(both: list[tuple[int, int]]) -> None:
    x, y = (np.array(ranks, dtype=np.float64) for ranks in zip(*both, strict=True))
    concordant = sum(np.sign(a[0] - b[0]) * np.sign(a[1] - b[1]) for a, b in combinations(both, 2))
    untied = [sum(a[i] != b[i] for a, b in combinations(both, 2)) for i in (0, 1)]
    expected = concordant / math.sqrt(untied[0] * untied[1]) if untied[0] * untied[1] else math.nan
    assert tau_b(x, y) == pytest.approx(expected, nan_ok=True)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=30))
def test_judgements_are_counted_once(said: list[tuple[int, int]]) -> None:
    units, values = (np.array(each, dtype=np.int64) for each in zip(*said, strict=True))
    counts: Floats = tally(units, values, (5, 3))
    assert counts.sum() == len(said)
    judged_by_several: Indices = counts.sum(-1) > 1
    assert coincidences(counts).sum() == pytest.approx(counts[judged_by_several].sum())
