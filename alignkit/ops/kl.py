"""Kullback-Leibler divergence between policy and reference: estimators of each token, and the adaptive penalty's controller."""

from __future__ import annotations

import torch
from torch import Tensor


def k1(logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """log p - log q at each token [b t], nats; unbiased, may be negative (Schulman, "Approximating KL divergence")."""
    return torch.where(mask, logprobs - reference, 0.0)


def k2(logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """Half the square of ``k1``: biased, low variance. As a loss its gradient is that of KL(policy || reference)."""
    return 0.5 * k1(logprobs, reference, mask) ** 2


def k3(logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """q/p - 1 - log(q/p) at each token [b t]: unbiased and never negative; for logging."""
    difference = k1(logprobs, reference, mask)
    return (-difference).exp() - 1.0 + difference


def sequence_kl(logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """The sum of ``k1`` over each response [b], nats."""
    return k1(logprobs, reference, mask).sum(dim=1)


def adaptive_kl_coef(coef: float, kl: float, *, target: float, horizon: float, episodes: int) -> float:
    """The next coefficient (Ziegler et al. 2019, section 2.2): up when ``kl`` (nats per sequence) is above ``target``, else down.

    ``episodes``: responses since the last call. The relative error is clipped to +-0.2.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * episodes / horizon)
