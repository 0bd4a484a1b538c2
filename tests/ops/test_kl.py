import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignkit.ops.kl import adaptive_kl_coef, k1, k2, k3, sequence_kl
from tests.ops.ragged import GARBAGE, Ragged, ragged


def after_512_episodes(kl: float) -> float:
    return adaptive_kl_coef(0.15, kl, target=6.0, horizon=10_000.0, episodes=512)


def test_the_estimators_worked_by_hand() -> None:
    # d = log p - log q = -1 - (-3) = 2: k1 = 2, k2 = 2, k3 = e^-2 - 1 + 2 = 1.1353.
    p, q, mask = torch.tensor([[-1.0, 0.0]]), torch.tensor([[-3.0, -9.0]]), torch.tensor([[True, False]])
    assert k1(p, q, mask).tolist() == [[2.0, 0.0]]
    assert k2(p, q, mask).tolist() == [[2.0, 0.0]]
    assert k3(p, q, mask)[0].tolist() == pytest.approx([1.135335, 0.0])
    assert sequence_kl(p, q, mask).tolist() == [2.0]


def test_k3_keeps_its_digits_where_policy_and_reference_are_close() -> None:
    # Half of d squared; exp(-d) - 1 in float32 would leave 0 or noise of 6e-8.
    d, mask = torch.tensor([[1e-4]]), torch.tensor([[True]])
    assert float(k3(d, torch.zeros(1, 1), mask)) == pytest.approx(0.5e-8, rel=0.05)


@given(ragged(), st.sampled_from(GARBAGE))
def test_what_stands_at_masked_cells_changes_no_bit(batch: Ragged, garbage: float) -> None:
    """I-PPO-6."""
    p, q = batch.numbers(2, torch.float32)
    mask, columns = batch.mask, batch.mask.shape[1]
    for estimator in (k1, k2, k3):
        want = estimator(p, q, mask)
        assert torch.equal(estimator(batch.spoil(p, garbage), batch.spoil(q, -garbage), mask), want)
        wide = estimator(batch.widen(p, garbage), batch.widen(q, -garbage), batch.widen(mask, False))
        assert torch.equal(wide[:, :columns], want)
        assert not wide[:, columns:].any()
    assert (k3(p, q, mask) >= 0).all()
    wide_sum = sequence_kl(batch.widen(p, garbage), batch.widen(q, -garbage), batch.widen(mask, False))
    assert torch.equal(wide_sum, sequence_kl(p, q, mask))


def test_the_controller() -> None:
    """I-PPO-13."""
    assert after_512_episodes(6.0) == 0.15
    # From 1.2 times the target on the relative error is clipped: beta grows by 0.2 * 512 / 10000.
    for kl in (7.2, 8.0, 1e9):
        assert after_512_episodes(kl) == pytest.approx(0.15 * (1 + 0.2 * 512 / 10_000), abs=1e-12)
    for kl in (4.8, 0.0, -3.0):
        assert after_512_episodes(kl) == pytest.approx(0.15 * (1 - 0.2 * 512 / 10_000), abs=1e-12)
    # In between it is proportional: 10% too much.
    assert after_512_episodes(6.6) == pytest.approx(0.15 * (1 + 0.1 * 512 / 10_000), abs=1e-12)
