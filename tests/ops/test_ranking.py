import math
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from alignkit.ops.losses import kwise_loss
from alignkit.ops.stats import pair_accuracy
from tests.ops.ragged import GARBAGE


@st.composite
def rankings(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Rewards and ranks [n k]: ties, and rows with fewer responses than the widest (rank 0)."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    ranks = torch.tensor([[draw(st.integers(0, 4)) for _ in range(width)] for _ in range(rows)])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    return torch.randn(rows, width, generator=generator, dtype=torch.float64), ranks


def pair_losses(rewards: Tensor, ranks: Tensor) -> list[float]:
    """-log sigmoid(better - worse) of each pair of one prompt that is not tied."""
    present = [(int(rank), float(reward)) for rank, reward in zip(ranks, rewards, strict=True) if rank > 0]
    return [math.log1p(math.exp(worse - better)) for a, better in present for b, worse in present if a < b]


def slope(rewards: Tensor, ranks: Tensor, *, preference: Tensor | None = None, center: float = 0.0) -> Tensor:
    x = rewards.clone().requires_grad_()
    return torch.autograd.grad(kwise_loss(x, ranks, preference=preference, center=center).sum(), x)[0]


def test_a_ranking_of_three_worked_by_hand() -> None:
    # Rewards 2, 1, 0 ranked 1st, 3rd, 2nd: pairs (2 over 1), (2 over 0), (0 over 1).
    #   log(1 + e^-1) = 0.313262    log(1 + e^-2) = 0.126928    log(1 + e^1) = 1.313262     mean 0.584484
    rewards, ranks = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[1, 3, 2]])
    assert float(kwise_loss(rewards, ranks)) == pytest.approx(0.584484, abs=1e-6)
    assert float(pair_accuracy(rewards, ranks)) == pytest.approx(2 / 3)
    # The last two tied: (2 over 1) and (2 over 0) remain, and it is 2 that divides: mean 0.220095.
    assert float(kwise_loss(rewards, torch.tensor([[1, 2, 2]]))) == pytest.approx(0.220095, abs=1e-6)
    # With a margin of 1 each gap is smaller by 1: log(1 + e^0), log(1 + e^-1), log(1 + e^2) = 0.693147, 0.313262, 2.126928.
    assert float(kwise_loss(rewards, ranks, margin=1.0)) == pytest.approx((0.693147 + 0.313262 + 2.126928) / 3, abs=1e-6)
    # Centering adds a tenth of the mean of (2 + 1)^2, (2 + 0)^2, (0 + 1)^2 = 14 / 3.
    assert float(kwise_loss(rewards, ranks, center=0.1)) == pytest.approx(0.584484 + 0.1 * 14 / 3, abs=1e-6)


def test_a_margin_of_its_own_for_each_prompt() -> None:
    rewards, ranks = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1, 2], [1, 2]])
    losses = kwise_loss(rewards, ranks, margin=torch.tensor([0.0, 1.0]))
    assert losses.tolist() == pytest.approx([0.313262, 0.693147], abs=1e-6)


def test_a_soft_preference_pulls_towards_its_own_odds() -> None:
    # 0.75 * log(1 + e^-1) + 0.25 * log(1 + e^1) = 0.234946 + 0.328315; the second prompt has none.
    rewards, ranks = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1, 2], [1, 2]])
    losses = kwise_loss(rewards, ranks, preference=torch.tensor([0.75, float("nan")]))
    assert losses.tolist() == pytest.approx([0.563262, 0.313262], abs=1e-6)
    # Where the gap is log(0.75 / 0.25) the model says just that: no gradient.
    at_odds = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    assert float(slope(at_odds, ranks[:1], preference=torch.tensor([0.75])).abs().max()) < 1e-12


@given(rankings())
def test_kwise_is_the_mean_over_pairs(made: tuple[Tensor, Tensor]) -> None:
    """I-RM-2."""
    rewards, ranks = made
    for loss, its_rewards, its_ranks in zip(kwise_loss(rewards, ranks), rewards, ranks, strict=True):
        pairs = pair_losses(its_rewards, its_ranks)
        assert float(loss) == pytest.approx(sum(pairs) / max(len(pairs), 1), abs=1e-6)


@given(rankings(), st.randoms(use_true_random=False))
def test_the_order_in_which_responses_are_listed_does_not_matter(made: tuple[Tensor, Tensor], random: Random) -> None:
    """I-RM-2."""
    rewards, ranks = made
    order = list(range(rewards.shape[1]))
    random.shuffle(order)
    assert torch.allclose(kwise_loss(rewards[:, order], ranks[:, order]), kwise_loss(rewards, ranks), atol=1e-12)
    assert torch.allclose(slope(rewards[:, order], ranks[:, order]), slope(rewards, ranks)[:, order], atol=1e-12)


@given(rankings())
def test_with_two_responses_it_is_the_pairwise_loss(made: tuple[Tensor, Tensor]) -> None:
    """I-RM-2."""
    chosen, rejected = made[0][:, 0], made[0][:, 1]
    ranks = torch.tensor([[1, 2]]).expand(len(chosen), 2)
    pairwise = -torch.nn.functional.logsigmoid(chosen - rejected)
    assert torch.allclose(kwise_loss(torch.stack([chosen, rejected], 1), ranks), pairwise, atol=1e-12)


@given(rankings(), st.floats(-10.0, 10.0))
def test_only_differences_count_unless_centred(made: tuple[Tensor, Tensor], shift: float) -> None:
    """I-RM-3."""
    rewards, ranks = made
    assert torch.allclose(kwise_loss(rewards + shift, ranks), kwise_loss(rewards, ranks), atol=1e-6)
    assert torch.allclose(slope(rewards + shift, ranks), slope(rewards, ranks), atol=1e-6)
    # Centering pulls the sum of each pair to 0, so that a shift of all is felt.
    pulled = slope(rewards + 100.0, ranks, center=0.01).sum(dim=1)
    has_pairs = torch.tensor([bool(pair_losses(*row)) for row in zip(rewards, ranks, strict=True)])
    assert (pulled[has_pairs] > 1.0).all()
    assert not pulled[~has_pairs].any()


def test_equal_rewards_are_a_coin_toss_and_count_as_wrong() -> None:
    """I-RM-3."""
    rewards, ranks = torch.full((1, 4), 0.3), torch.tensor([[4, 2, 1, 3]])
    assert float(kwise_loss(rewards, ranks)) == pytest.approx(math.log(2.0), abs=1e-6)
    assert float(pair_accuracy(rewards, ranks)) == 0.0


@given(rankings(), st.sampled_from(GARBAGE))
def test_neither_ties_nor_absent_responses_give_a_gradient(made: tuple[Tensor, Tensor], garbage: float) -> None:
    """I-RM-4."""
    rewards, ranks = made
    everyone_ties = torch.where(ranks > 0, 1, 0)
    assert torch.equal(kwise_loss(rewards, everyone_ties, center=0.1), torch.zeros(len(rewards), dtype=torch.float64))
    assert not slope(rewards, everyone_ties, center=0.1).any()
    spoiled = torch.where(ranks > 0, rewards, garbage)
    assert torch.equal(kwise_loss(spoiled, ranks), kwise_loss(torch.where(ranks > 0, rewards, 0.0), ranks))
    got = slope(spoiled, ranks)
    assert torch.equal(got, slope(rewards, ranks))
    assert not got[ranks == 0].any()


def test_a_tied_pair_gives_nothing_while_the_others_do() -> None:
    """I-RM-4: with the two tied responses told apart by nothing, their gradients are those of their pairs with the third alone."""
    rewards = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    got = slope(rewards, torch.tensor([[1, 1, 2]]))[0]
    # d/dx of -log sigmoid(x - 0.5) / 2 is -sigmoid(0.5 - x) / 2.
    assert got[:2].tolist() == pytest.approx([-0.5 / (1 + math.exp(0.5)), -0.5 / (1 + math.exp(-2.5))])


def test_a_gap_of_thousands_overflows_nothing() -> None:
    rewards, ranks = torch.tensor([[-5000.0, 5000.0]]), torch.tensor([[1, 2]])
    assert float(kwise_loss(rewards, ranks)) == pytest.approx(10_000.0)
    assert slope(rewards, ranks).tolist() == [[-1.0, 1.0]]
