"""Importance weights for tokens that were drawn by a sampler whose numbers are not quite the trainer's.

``logprobs`` are the training forward's log-probabilities of the tokens before any update, ``sampled`` are those that the sampler
recorded; both [b t], nats. A weight multiplies a token's policy loss and has no gradient; the ratio of PPO stays between two training
forwards. All are 0 where ``mask`` is False, and exactly 1 where the two agree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignkit.ops.masked import masked_sum


def importance_weights(logprobs: Tensor, sampled: Tensor, mask: Tensor) -> Tensor:
    """exp(logprobs - sampled) [b t]."""
    return torch.where(mask, torch.where(mask, logprobs - sampled, 0.0).exp(), 0.0)


def truncated_weights(logprobs: Tensor, sampled: Tensor, mask: Tensor, *, high: float) -> Tensor:
    """Truncated importance sampling (TIS): no weight above ``high``."""
    return importance_weights(logprobs, sampled, mask).clamp(max=high)


def bounded_weights(logprobs: Tensor, sampled: Tensor, mask: Tensor, *, low: float, high: float) -> Tensor:
    """IcePop: tokens whose weight lies outside ``low`` .. ``high`` teach nothing."""
    weights = importance_weights(logprobs, sampled, mask)
    return torch.where((weights >= low) & (weights <= high), weights, 0.0)


def sequence_weights(logprobs: Tensor, sampled: Tensor, mask: Tensor, *, low: float, high: float) -> Tensor:
    """Sequence mask: 1 for responses whose geometric mean weight lies within ``low`` .. ``high``, 0 for all tokens of the others."""
    mean = geometric_mean_weight(logprobs, sampled, mask)
    kept = (mean >= low) & (mean <= high)
    return (mask & kept[:, None]).to(logprobs.dtype)


def geometric_mean_weight(logprobs: Tensor, sampled: Tensor, mask: Tensor) -> Tensor:
    """exp of the mean log weight of each response [b]; 1 for a row without a True cell."""
    difference = torch.where(mask, logprobs - sampled, 0.0)
    # cumsum adds from left to right, so that more padding on the right cannot change even the order of rounding.
    return (difference.cumsum(dim=1)[:, -1] / mask.sum(dim=1).clamp(min=1)).exp()


def mismatch(logprobs: Tensor, sampled: Tensor, mask: Tensor) -> Tensor:
    """Mean distance of the two over the True cells, nats per token."""
    return masked_sum(torch.where(mask, logprobs - sampled, 0.0).abs(), mask) / mask.sum().clamp(min=1)
