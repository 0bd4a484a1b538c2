"""Figures of pairs and samples, worked by hand."""

from __future__ import annotations

from math import exp

import pytest
import torch

from alignkit.ops.stats import calibration_error, correlation, pair_gaps


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + exp(-x))


def test_a_gap_is_the_better_less_the_worse_and_ties_have_none() -> None:
    rewards, ranks = torch.tensor([[3.0, 1.0, 5.0], [2.0, 9.0, float("nan")]]), torch.tensor([[1, 2, 2], [2, 1, 0]])
    assert sorted(pair_gaps(rewards, ranks).tolist()) == [-2.0, 2.0, 7.0]


def test_calibration_by_hand() -> None:
    # Two bins, parted at a probability of 0.75: 0.2 and -0.2 fall into the lower one, of which half is right; 4 into the upper.
    gaps = torch.tensor([0.2, -0.2, 4.0])
    lower, upper = 2 * abs(sigmoid(0.2) - 0.5), abs(sigmoid(4.0) - 1.0)
    assert float(calibration_error(gaps, bins=2)) == pytest.approx((lower + upper) / 3)


def test_a_model_that_is_sure_and_wrong_is_as_far_off_as_can_be() -> None:
    assert float(calibration_error(torch.full((7,), -50.0))) == pytest.approx(1.0)
    assert float(calibration_error(torch.full((7,), 50.0))) == pytest.approx(0.0)
    assert float(calibration_error(torch.zeros(7))) == pytest.approx(0.5)  # equal rewards choose wrongly
    assert float(calibration_error(torch.zeros(0))) == 0.0


def test_correlation_by_hand() -> None:
    x = torch.tensor([1.0, 2.0, 3.0])
    assert float(correlation(x, 2.0 * x + 1.0)) == pytest.approx(1.0)
    assert float(correlation(x, -x)) == pytest.approx(-1.0)
    assert float(correlation(x, torch.tensor([1.0, 0.0, 1.0]))) == pytest.approx(0.0, abs=1e-7)
    assert float(correlation(x, torch.ones(3))) == 0.0
