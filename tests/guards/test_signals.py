"""The signs of an exploited reward, on numbers worked by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignkit.guards.signals import distinct_share, duplicate_share, is_repetitive, repeated_share, spearman

NUMBERS = st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=2, max_size=40)


def test_ranks_count_and_not_distances() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 4000]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [9, 7, 5, -100]) == pytest.approx(-1.0)
    # Ranks 1 2 3 4 5 and 2 1 4 3 5: 1 - 6 * (1 + 1 + 1 + 1) / (5 * 24).
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)


def test_equal_values_share_their_rank() -> None:
    # Ranks 1.5 1.5 3 and 1 2 3: covariance 1.5, variances 1.5 and 2.
    assert spearman([5, 5, 7], [1, 2, 3]) == pytest.approx(1.5 / (1.5 * 2) ** 0.5)


def test_what_does_not_vary_is_not_correlated() -> None:
    assert spearman([3, 3, 3], [1, 2, 3]) == 0.0
    assert spearman([1, 2], [7, 7]) == 0.0


@given(NUMBERS)
def test_a_correlation_is_symmetric_and_bounded(pairs: list[tuple[int, int]]) -> None:
    x, y = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    assert spearman(x, y) == pytest.approx(spearman(y, x))
    assert abs(spearman(x, y)) <= 1.0 + 1e-9
    assert spearman(x, [-b for b in y]) == pytest.approx(-spearman(x, y))


def test_distinct_n_grams() -> None:
    assert distinct_share([1, 2, 3, 4, 5]) == 1.0
    assert distinct_share([1, 1, 1, 1, 1]) == pytest.approx(1 / 3)  # 1 1 1 three times
    assert distinct_share([1, 2, 1, 2, 1, 2]) == pytest.approx(2 / 4)  # 1 2 1, 2 1 2, and both again
    assert distinct_share([1, 2]) == 1.0
    assert distinct_share([]) == 1.0


def test_what_the_most_frequent_n_gram_covers() -> None:
    assert repeated_share([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3, 7]) == pytest.approx(9 / 12)
    assert repeated_share([1, 2, 3, 9, 1, 2, 3, 8]) == 0.0  # twice may be style
    assert repeated_share([1] * 10) == 1.0  # occurrences that overlap are not counted twice
    assert repeated_share([]) == 0.0


def test_who_repeats_himself() -> None:
    assert is_repetitive([4] * 12)
    assert is_repetitive([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3, 7])
    assert not is_repetitive(list(range(12)))
    assert not is_repetitive([])


def test_one_answer_to_several_prompts() -> None:
    assert duplicate_share(["a", "b", "c", "d"], ["yes", "yes", "no", "maybe"]) == 0.5
    assert duplicate_share(["a", "a", "b"], ["yes", "yes", "no"]) == 0.0  # two samples of one prompt may agree
    assert duplicate_share([], []) == 0.0
