from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from alignkit.ops.losses import clipped_policy_loss, clipped_share, clipped_value_loss, nll_loss, score_index
from alignkit.ops.masked import masked_mean
from alignkit.ops.stats import explained_variance
from tests.ops.ragged import GARBAGE, Ragged, ragged


def slope_of_one_token(advantage: float, ratio: float) -> float:
    new = torch.tensor([[ratio]], dtype=torch.float64).log().requires_grad_()
    terms = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([[advantage]], dtype=torch.float64), torch.tensor([[True]])
    slope = float(torch.autograd.grad(clipped_policy_loss(new, *terms, clip=0.2, tokens_in_minibatch=1), new)[0])
    share = float(clipped_share(new.detach(), *terms, clip=0.2, tokens_in_minibatch=1))
    assert share == float(slope == 0.0)
    return slope


def test_a_token_that_moved_far_enough_gives_no_gradient_and_is_counted() -> None:
    """I-PPO-11."""
    assert slope_of_one_token(advantage=1.0, ratio=1.3) == 0.0
    assert slope_of_one_token(advantage=-1.0, ratio=0.7) == 0.0
    # Moved the wrong way: nothing may hold it there. The gradient of -A * ratio by the log-probability is -A * ratio.
    assert slope_of_one_token(advantage=1.0, ratio=0.7) == pytest.approx(-0.7)
    assert slope_of_one_token(advantage=-1.0, ratio=1.3) == pytest.approx(1.3)
    assert slope_of_one_token(advantage=2.0, ratio=1.1) == pytest.approx(-2.2)


def test_the_surrogate_worked_by_hand() -> None:
    # Ratios e^log(1.5) = 1.5, 0.5, 1; advantages 1, 1, -2; clip 0.2; the fourth token does not count.
    #   max(-1.5, -1.2) = -1.2      max(-0.5, -0.8) = -0.5      max(2, 2) = 2      sum 0.3, over 3 tokens 0.1
    new = torch.tensor([[1.5, 0.5], [1.0, 7.0]], dtype=torch.float64).log()
    advantages = torch.tensor([[1.0, 1.0], [-2.0, 5.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    loss = clipped_policy_loss(new, torch.zeros_like(new), advantages, mask, clip=0.2, tokens_in_minibatch=3)
    assert float(loss) == pytest.approx(0.1)
    # Of the two out of bounds only the first is clipped away.
    assert float(clipped_share(new, torch.zeros_like(new), advantages, mask, clip=0.2, tokens_in_minibatch=3)) == pytest.approx(1 / 3)


@given(ragged(), st.sampled_from([torch.float32, torch.float64]))
def test_where_nothing_has_moved_ppo_is_the_plain_policy_gradient(batch: Ragged, dtype: torch.dtype) -> None:
    """I-PPO-2, I-PPO-3."""
    logprobs, advantages = batch.numbers(2, dtype)
    count = int(batch.mask.sum())
    new, plain = logprobs.clone().requires_grad_(), logprobs.clone().requires_grad_()
    loss = clipped_policy_loss(new, logprobs, advantages, batch.mask, clip=0.2, tokens_in_minibatch=count)
    (ours,), (theirs,) = torch.autograd.grad(loss, new), torch.autograd.grad(-masked_mean(advantages * plain, batch.mask), plain)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=0.0)
    assert torch.allclose(loss, -masked_mean(advantages, batch.mask), atol=1e-6)
    assert float(clipped_share(logprobs, logprobs, advantages, batch.mask, clip=0.2, tokens_in_minibatch=count)) == 0.0


def test_the_value_loss_worked_by_hand() -> None:
    # Value 2, before 1, return 0, clip 0.5: max(2^2, 1.5^2) / 2 = 2. Value 0, before 1, return 0: max(0, 0.5^2) / 2 = 0.125.
    values, old, returns = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0]]), torch.zeros(1, 2)
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert float(clipped_value_loss(values, old, returns, mask, clip=0.5, tokens_in_minibatch=2)) == pytest.approx(2.125 / 2)
    assert float(clipped_value_loss(values, old, returns, mask, clip=None, tokens_in_minibatch=2)) == pytest.approx(2.0 / 2)


def all_losses(inputs: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
    """Every loss and figure of PPO and SFT, on the same three tensors."""
    new, old, third = inputs
    count = int(mask.sum())
    return [
        clipped_policy_loss(new, old, third, mask, clip=0.2, tokens_in_minibatch=count),
        clipped_value_loss(new, old, third, mask, clip=0.2, tokens_in_minibatch=count),
        clipped_value_loss(new, old, third, mask, clip=None, tokens_in_minibatch=count),
        nll_loss(new, mask, tokens_in_step=count),
        clipped_share(new, old, third, mask, clip=0.2, tokens_in_minibatch=count),
        explained_variance(new, third, mask),
    ]


@given(ragged(), st.sampled_from(GARBAGE))
def test_what_stands_at_masked_cells_changes_no_bit_of_value_or_gradient(batch: Ragged, garbage: float) -> None:
    """I-PPO-6."""
    clean = [x.requires_grad_() for x in batch.numbers(3, torch.float32)]
    want, slopes = all_losses(clean, batch.mask), []
    for loss in want[:4]:
        slopes.append(torch.autograd.grad(loss, clean[0], retain_graph=True)[0])
    spoiled = [batch.spoil(x, garbage) for x in clean]
    wide = [batch.widen(x, garbage) for x in spoiled]
    for inputs, mask in ((spoiled, batch.mask), (wide, batch.widen(batch.mask, False))):
        got = all_losses(inputs, mask)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want, strict=True))
        for loss, slope in zip(got[:4], slopes, strict=True):
            (ours,) = torch.autograd.grad(loss, inputs[0], retain_graph=True)
            assert torch.equal(ours[:, : slope.shape[1]], torch.where(batch.mask, slope, 0.0))
            assert not ours[~mask].any()


@given(ragged(), st.integers(1, 5))
def test_the_step_does_not_depend_on_how_it_is_split(batch: Ragged, size: int) -> None:
    """I-PPO-8 and I-SFT-1, for the losses: microbatches share the whole step's count."""
    inputs = list(batch.numbers(3))
    count = int(batch.mask.sum())

    def slope(rows_at_once: int, *, value: bool) -> Tensor:
        new, total = inputs[0].clone().requires_grad_(), torch.zeros((), dtype=torch.float64)
        for first in range(0, len(new), rows_at_once):
            part = slice(first, first + rows_at_once)
            terms = new[part], inputs[1][part], inputs[2][part], batch.mask[part]
            loss = clipped_value_loss if value else clipped_policy_loss
            total = total + loss(*terms, clip=0.2, tokens_in_minibatch=count)
        return torch.autograd.grad(total, new)[0]

    for value in (False, True):
        assert torch.allclose(slope(size, value=value), slope(len(batch.mask), value=value), rtol=1e-12)


def test_a_step_without_tokens_has_loss_zero() -> None:
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    x = torch.full((2, 2), float("nan"))
    for loss in all_losses((x, x, x), nothing):
        assert float(loss) == 0.0


def test_explained_variance() -> None:
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, 9.0]]), torch.tensor([[True, True, True, False]])
    assert float(explained_variance(returns, returns, mask)) == 1.0
    # Off by the same amount everywhere: centred, so nothing is lost by it.
    assert float(explained_variance(returns + 5.0, returns, mask)) == pytest.approx(1.0)
    assert float(explained_variance(torch.zeros(1, 4), returns, mask)) == pytest.approx(0.0)
    # Wrong way round: 1 - Var(2 * returns) / Var(returns) = -3.
    assert float(explained_variance(-returns, returns, mask)) == pytest.approx(-3.0)
    assert float(explained_variance(returns, torch.ones(1, 4), mask)) == 0.0


def test_the_reward_is_read_at_the_last_token_whatever_side_the_padding_is_on() -> None:
    mask = torch.tensor([[True, True, True, False, False], [False, False, True, True, True], [True] * 5])
    assert score_index(mask).tolist() == [2, 4, 4]
