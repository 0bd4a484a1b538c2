from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from alignkit.ops.advantages import gae, kl_penalized_rewards, penalize_missing_eos
from alignkit.ops.kl import k1
from alignkit.ops.masked import last_true
from tests.ops.ragged import GARBAGE, Ragged, ragged


def recursion(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """The paper's sums, term by term, on each response cut out of its row: A_t = sum over l of (gamma lam)^l delta_(t+l)."""
    advantages = np.zeros(mask.shape)
    for row, counts in enumerate(mask.numpy()):
        (columns,) = np.nonzero(counts)
        r, v = rewards[row, columns].double().numpy(), np.append(values[row, columns].double().numpy(), 0.0)
        delta = r + gamma * v[1:] - v[:-1]
        for t, column in enumerate(columns):
            advantages[row, column] = sum((gamma * lam) ** k * delta[t + k] for k in range(len(delta) - t))
    return advantages


def test_gae_worked_by_hand() -> None:
    # A prompt column, three response tokens, a padding column; gamma 1, lambda 0.5.
    #   rewards   0.0   0.0   1.0        values   0.2   0.4   0.6, and 0 after the last
    #   delta_3 = 1.0 + 0.0 - 0.6 =  0.4                      A_3 = 0.4
    #   delta_2 = 0.0 + 0.6 - 0.4 =  0.2                      A_2 = 0.2 + 0.5 * 0.4 = 0.4
    #   delta_1 = 0.0 + 0.4 - 0.2 =  0.2                      A_1 = 0.2 + 0.5 * 0.4 = 0.4
    #   returns A + V:  0.6   0.8   1.0
    rewards = torch.tensor([[9.0, 0.0, 0.0, 1.0, 9.0]], dtype=torch.float64)
    values = torch.tensor([[9.0, 0.2, 0.4, 0.6, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[False, True, True, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.5)
    assert advantages[0].tolist() == pytest.approx([0.0, 0.4, 0.4, 0.4, 0.0])
    assert returns[0].tolist() == pytest.approx([0.0, 0.6, 0.8, 1.0, 0.0])


@given(ragged(min_tokens=0), st.floats(0.5, 1.0), st.floats(0.0, 1.0), st.sampled_from([torch.float32, torch.float64]))
def test_gae_is_the_sum_of_the_paper(batch: Ragged, gamma: float, lam: float, dtype: torch.dtype) -> None:
    """I-PPO-4."""
    rewards, values = batch.numbers(2, dtype)
    advantages, returns = gae(rewards, values, batch.mask, gamma=gamma, lam=lam)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert advantages.dtype == returns.dtype == dtype
    assert np.allclose(advantages.numpy(), recursion(rewards, values, batch.mask, gamma, lam), atol=tolerance)
    assert torch.equal(returns, torch.where(batch.mask, advantages + values, 0.0))


@given(ragged())
def test_gae_at_its_limits(batch: Ragged) -> None:
    """I-PPO-4: lambda 1 sums the rewards to come, lambda 0 looks one token ahead, no values leave the rewards alone."""
    rewards, values = (torch.where(batch.mask, x, 0.0) for x in batch.numbers(2))
    to_come = rewards.flip(1).cumsum(1).flip(1)
    _, returns = gae(rewards, values, batch.mask, gamma=1.0, lam=1.0)
    assert torch.allclose(returns, torch.where(batch.mask, to_come, 0.0))
    one_ahead, _ = gae(rewards, values, batch.mask, gamma=0.9, lam=0.0)
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    assert torch.allclose(one_ahead, torch.where(batch.mask, rewards + 0.9 * following - values, 0.0))
    discounted, same = gae(rewards, torch.zeros_like(values), batch.mask, gamma=0.9, lam=1.0)
    assert torch.equal(discounted, same)
    columns = torch.arange(batch.mask.shape[1], dtype=torch.float64)
    for row, column in batch.mask.nonzero().tolist():
        assert discounted[row, column] == pytest.approx(float((rewards[row] * 0.9 ** (columns - column))[column:].sum()))


@given(ragged(), st.floats(0.0, 2.0))
def test_rewards_add_up_to_the_score_less_the_penalty(batch: Ragged, coef: float) -> None:
    """I-PPO-7."""
    p, q, noise = batch.numbers(3, torch.float32)
    scores = noise[:, 0]
    rewards = kl_penalized_rewards(scores, p, q, batch.mask, coef=coef)
    penalty = coef * k1(p, q, batch.mask).sum(dim=1)
    assert torch.allclose(rewards.sum(dim=1), scores - penalty, atol=1e-5)
    assert not rewards[~batch.mask].any()
    # The score is at the last token and nowhere else.
    with_score = kl_penalized_rewards(scores, p, q, batch.mask, coef=coef) - kl_penalized_rewards(0.0 * scores, p, q, batch.mask, coef=coef)
    places = torch.zeros_like(batch.mask)
    places[torch.arange(len(scores)), last_true(batch.mask)] = True
    assert not with_score[~places].any()


def test_a_response_that_is_masked_as_a_whole_gets_no_reward() -> None:
    mask = torch.tensor([[False, False], [False, True]])
    scores = torch.tensor([float("nan"), 3.0])
    assert kl_penalized_rewards(scores, torch.zeros(2, 2), torch.zeros(2, 2), mask, coef=1.0).tolist() == [[0.0, 0.0], [0.0, 3.0]]


@given(ragged(), st.sampled_from(GARBAGE))
def test_what_stands_at_masked_cells_changes_no_bit(batch: Ragged, garbage: float) -> None:
    """I-PPO-6."""
    p, q, values = batch.numbers(3, torch.float32)
    scores, columns = values[:, 0].clone(), batch.mask.shape[1]

    def whole(inputs: Iterable[Tensor], mask: Tensor) -> tuple[Tensor, ...]:
        p, q, values = inputs
        rewards = kl_penalized_rewards(scores, p, q, mask, coef=0.1)
        return rewards, *gae(rewards + torch.where(mask, 0.0, garbage), values, mask, gamma=0.99, lam=0.95)

    want = whole((p, q, values), batch.mask)
    spoiled = whole((batch.spoil(x, garbage) for x in (p, q, values)), batch.mask)
    assert all(torch.equal(ours, clean) for ours, clean in zip(spoiled, want, strict=True))
    wide = whole((batch.widen(x, garbage) for x in (p, q, values)), batch.widen(batch.mask, False))
    for ours, clean in zip(wide, want, strict=True):
        assert torch.equal(ours[:, :columns], clean)
        assert not ours[:, columns:].any()


def test_a_missing_eos_costs_its_penalty_exactly_once_whatever_the_length() -> None:
    """I-PPO-14: cut off at full length; ended inside; ended by its first token; ended by the very last token."""
    mask = torch.tensor([[True] * 4, [True] * 3 + [False], [True] + [False] * 3, [True] * 4])
    finished = torch.tensor([False, True, True, True])
    judged = penalize_missing_eos(torch.tensor([2.0, 2.0, 2.0, 2.0]), finished, penalty=0.5)
    assert judged.tolist() == [1.5, 2.0, 2.0, 2.0]
    rewards = kl_penalized_rewards(judged, torch.zeros(4, 4), torch.zeros(4, 4), mask, coef=0.1)
    assert rewards.tolist() == [[0.0, 0.0, 0.0, 1.5], [0.0, 0.0, 2.0, 0.0], [2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]]
    # A response of one token: its advantage is the score less its value.
    advantages, returns = gae(rewards, torch.full((4, 4), 0.25), mask, gamma=1.0, lam=0.95)
    assert float(advantages[2, 0]) == 1.75
    assert float(returns[2, 0]) == 2.0
