"""Weights against a sampler that is not quite the trainer, worked by hand."""

from __future__ import annotations

from math import exp, log, nan, sqrt

import pytest
import torch

from alignkit.ops.correction import (
    bounded_weights,
    geometric_mean_weight,
    importance_weights,
    mismatch,
    sequence_weights,
    truncated_weights,
)

TRAINED = torch.tensor([[log(0.6), log(0.1), nan], [log(0.2), log(0.3), log(0.5)]])
SAMPLED = torch.tensor([[log(0.2), log(0.4), 1e9], [log(0.2), log(0.3), log(0.5)]])
MASK = torch.tensor([[True, True, False], [True, True, True]])


def test_a_weight_is_the_quotient_of_the_two_probabilities() -> None:
    assert importance_weights(TRAINED, SAMPLED, MASK).tolist() == [[pytest.approx(3.0), pytest.approx(0.25), 0.0], [1.0, 1.0, 1.0]]


def test_truncated_no_more_than_high() -> None:
    assert truncated_weights(TRAINED, SAMPLED, MASK, high=2.0)[0].tolist() == [2.0, pytest.approx(0.25), 0.0]


def test_icepop_leaves_out_what_is_out_of_bounds_on_either_side() -> None:
    assert bounded_weights(TRAINED, SAMPLED, MASK, low=0.5, high=5.0)[0].tolist() == [pytest.approx(3.0), 0.0, 0.0]
    assert bounded_weights(TRAINED, SAMPLED, MASK, low=0.2, high=2.0)[0].tolist() == [0.0, pytest.approx(0.25), 0.0]


def test_a_response_is_judged_by_its_geometric_mean() -> None:
    assert geometric_mean_weight(TRAINED, SAMPLED, MASK).tolist() == [pytest.approx(sqrt(3.0 * 0.25)), 1.0]
    assert sequence_weights(TRAINED, SAMPLED, MASK, low=0.9, high=2.0).tolist() == [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    assert sequence_weights(TRAINED, SAMPLED, MASK, low=0.8, high=2.0).tolist() == [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]


def test_the_mismatch_is_the_mean_distance_per_token() -> None:
    assert float(mismatch(TRAINED, SAMPLED, MASK)) == pytest.approx((log(3.0) + log(4.0)) / 5)


def test_i_ppo_15_where_the_two_agree_every_weight_is_exactly_one() -> None:
    for weights in (
        importance_weights(SAMPLED, SAMPLED, MASK),
        truncated_weights(SAMPLED, SAMPLED, MASK, high=1.0),
        bounded_weights(SAMPLED, SAMPLED, MASK, low=1.0, high=1.0),
        sequence_weights(SAMPLED, SAMPLED, MASK, low=1.0, high=1.0),
    ):
        assert torch.equal(weights, MASK.float())


def test_a_row_without_a_token_weighs_nothing_and_is_no_number_gone_wrong() -> None:
    none = torch.zeros(1, 3, dtype=torch.bool)
    assert float(geometric_mean_weight(TRAINED[:1], SAMPLED[:1], none)) == exp(0.0)
    assert torch.equal(sequence_weights(TRAINED[:1], SAMPLED[:1], none, low=0.5, high=2.0), torch.zeros(1, 3))
