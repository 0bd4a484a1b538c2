import torch
from hypothesis import given
from hypothesis import strategies as st

from alignkit.ops.masked import last_true, masked_mean, masked_sum, masked_whiten
from tests.ops.ragged import GARBAGE, Ragged, ragged


def test_a_mean_of_nothing_is_zero() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert masked_mean(torch.full((2, 3), float("nan")), nothing) == 0.0
    assert torch.equal(masked_whiten(torch.full((2, 3), float("nan")), nothing), torch.zeros(2, 3))


def test_whitening_worked_by_hand() -> None:
    # True cells 1, 3, 5, 7: mean 4, deviations -3, -1, 1, 3, biased variance (9 + 1 + 1 + 9) / 4 = 5 (the unbiased one is 20/3).
    x = torch.tensor([[1.0, 3.0, 100.0], [5.0, 7.0, -100.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, False]])
    unit = 5.0**-0.5
    want = torch.tensor([[-3.0, -1.0, 0.0], [1.0, 3.0, 0.0]], dtype=torch.float64) * unit
    assert torch.allclose(masked_whiten(x, mask), want, atol=1e-8)
    # Scaled only: the mean of 4 stays where it was.
    assert torch.allclose(masked_whiten(x, mask, center=False), torch.where(mask, want + 4.0, 0.0), atol=1e-8)


@given(ragged(min_tokens=3))
def test_whitened_numbers_have_mean_zero_and_biased_variance_one(batch: Ragged) -> None:
    """I-PPO-5."""
    (x,) = batch.numbers(1, torch.float32)
    whitened = masked_whiten(5.0 + 3.0 * x, batch.mask)
    assert abs(masked_mean(whitened, batch.mask)) < 1e-5
    assert abs(masked_mean(whitened**2, batch.mask) - 1.0) < 1e-5
    assert not whitened[~batch.mask].any()


@given(ragged(), st.sampled_from(GARBAGE))
def test_what_stands_at_masked_cells_changes_no_bit_of_value_or_gradient(batch: Ragged, garbage: float) -> None:
    """I-PPO-5, I-PPO-6."""
    (clean,) = (x.requires_grad_() for x in batch.numbers(1, torch.float32))
    wide_mask = batch.widen(batch.mask, False)
    for function in (masked_sum, masked_mean, masked_whiten, lambda x, mask: masked_whiten(x, mask, center=False)):
        want = function(clean, batch.mask)
        (slope,) = torch.autograd.grad((want * want.detach()).sum(), clean)
        for x, mask in ((batch.spoil(clean, garbage), batch.mask), (batch.widen(batch.spoil(clean, garbage), garbage), wide_mask)):
            columns = batch.mask.shape[1]
            got = function(x, mask)
            assert torch.equal(got[:, :columns] if got.ndim else got, want)
            (its_slope,) = torch.autograd.grad((got * got.detach()).sum(), x)
            assert its_slope.isfinite().all()
            assert torch.allclose(its_slope[:, :columns], slope, rtol=1e-5, atol=1e-6)
            assert not its_slope[~mask].any()


def test_the_last_true_column() -> None:
    mask = torch.tensor([[True, True, False], [False, True, True], [False, True, False], [True, False, False], [False, False, False]])
    assert last_true(mask).tolist() == [1, 2, 1, 0, 0]
