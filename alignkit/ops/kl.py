"""Kullback-Leibler divergence between policy and reference: estimators of each token, and the adaptive penalty's controller.

``logprobs`` are log p of the distribution that the tokens were drawn from, ``reference`` is log q of the same tokens; both [b t], nats.
"""

from __future__ import annotations

import torch
from torch import Tensor


def k1(logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """log p - log q at each token [b t]: unbiased, may be negative (Schulman, "Approximating KL divergence"); 0 where masked.

    In the reward its gradient is that of KL(policy || reference); as a loss it has none on average.
    """
    return torch.where(mask, logprobs - reference, 0.0)


def k2(logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """Half the square of ``k1``: biased, low variance. As a loss its gradient is that of KL(policy || reference)."""
    return 0.5 * k1(logprobs, reference, mask) ** 2


def k3(logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """q/p - 1 - log(q/p) at each token [b t]: unbiased and never negative; for logging.

    As a loss its gradient is that of the other direction, KL(reference || policy).
    """
    difference = k1(logprobs, reference, mask)
    # expm1 keeps the digits that exp - 1 loses where the two distributions are close, which is where KL is read.
    return torch.expm1(-difference) + difference


def sequence_kl(logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """The sum of ``k1`` over each response [b], nats."""
    # cumsum adds from left to right, so that more padding on the right cannot change even the order of rounding.
    return k1(logprobs, reference, mask).cumsum(dim=1)[:, -1]


def adaptive_kl_coef(coef: float, kl: float, *, target: float, horizon: float, episodes: int) -> float:
    """The next coefficient (Ziegler et al. 2019, section 2.2): up when ``kl`` (nats per sequence) is above ``target``, else down.

    ``episodes``: responses since the last call. The relative error is clipped to +-0.2.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * episodes / horizon)
