"""Known mistakes of alignment code, as far as the tensor maths can make them."""

import torch
from torch import Tensor

from alignkit.ops.kl import k1, k2, k3, sequence_kl
from alignkit.ops.logprobs import entropy, selective_logprobs, token_logprobs
from alignkit.ops.losses import clipped_policy_loss, clipped_share, clipped_value_loss, nll_loss

WORDS = 32_000


def test_s6_log_probabilities_of_bfloat16_logits_are_computed_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3.0 * torch.randn(64, WORDS, generator=generator)).bfloat16()
    tokens = torch.arange(64)
    exact = torch.log_softmax(logits.double(), dim=-1)[torch.arange(64), tokens]
    ours = token_logprobs(logits, tokens)
    assert ours.dtype == entropy(logits).dtype == torch.float32
    assert float((ours - exact).abs().max()) < 1e-5
    # The mistake: rounding to bfloat16 once more, in the softmax, is worse than this by a factor of thousands.
    careless = torch.log_softmax(logits, dim=-1)[torch.arange(64), tokens]
    assert float((careless - exact).abs().max()) > 1e-2
    # A head in bfloat16: its hidden states, weight and logits are rounded, the log-probabilities are not.
    hidden, weight = (torch.randn(rows, 16, generator=generator).bfloat16() for rows in (64, WORDS))
    by_head, entropies = selective_logprobs(hidden, weight, tokens)
    assert by_head.dtype == entropies.dtype == torch.float32
    assert float((by_head - token_logprobs(hidden @ weight.T, tokens)).abs().max()) < 3e-5  # of 22 nats, in float32


def test_s7_a_step_of_microbatches_is_not_a_mean_of_their_means() -> None:
    # One row of 1 token with NLL 4, one of 3 tokens with NLL 1, 1, 2: 8 nats over 4 tokens are 2. The mean of means says 8/3.
    logprobs = torch.tensor([[-4.0, 0.0, 0.0], [-1.0, -1.0, -2.0]])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    ours = sum(float(nll_loss(logprobs[i : i + 1], mask[i : i + 1], tokens_in_step=4)) for i in range(2))
    careless = sum(float(nll_loss(logprobs[i : i + 1], mask[i : i + 1], tokens_in_step=int(mask[i].sum()))) for i in range(2)) / 2
    assert ours == 2.0
    assert abs(careless - 8 / 3) < 1e-6


def test_s12_minus_infinity_and_nan_at_padding_do_no_harm() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    clean = torch.tensor([[-1.0, -2.0, 0.0], [-0.5, 0.0, 0.0]])
    old = clean - torch.tensor(0.05)
    for garbage in (float("nan"), float("inf"), -float("inf")):

        def figures(new: Tensor, old: Tensor) -> list[Tensor]:
            ppo = {"clip": 0.2, "tokens_in_minibatch": 3}
            return [
                clipped_policy_loss(new, old, old, mask, **ppo),
                clipped_value_loss(new, old, old, mask, **ppo),
                nll_loss(new, mask, tokens_in_step=3),
                *(estimator(new, old, mask).sum() for estimator in (k1, k2, k3, sequence_kl)),
                clipped_share(new, old, old, mask, **ppo),
            ]

        spoiled = torch.where(mask, clean, garbage).requires_grad_()
        got = figures(spoiled, torch.where(mask, old, garbage))
        for ours, want in zip(got, figures(clean, old), strict=True):
            assert torch.equal(ours, want)
        for loss in got[:-1]:
            (slope,) = torch.autograd.grad(loss, spoiled, retain_graph=True)
            assert slope.isfinite().all()
            assert not slope[~mask].any()
    # The mistake: masked after exp, infinity times 0 is NaN.
    assert torch.isnan(torch.tensor(float("inf")).exp() * 0.0)
