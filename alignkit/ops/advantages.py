"""From scores to advantages: token rewards with the KL penalty inside, and generalised advantage estimation."""

from __future__ import annotations

import torch
from torch import Tensor

from alignkit.ops.kl import k1


def last_true(mask: Tensor) -> Tensor:
    """Column [b] of the last True cell of each row of ``mask`` [b t]; 0 for a row without one."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, columns, 0).amax(dim=1)


def kl_penalized_rewards(scores: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, *, coef: float) -> Tensor:
    """Token rewards [b t]: -coef * (log p - log q) everywhere, and the score [b] added at the last True token of its row.

    The score stands on the response's own last token, not one past it. A row without a True token gets no reward at all.
    """
    rewards = -coef * k1(logprobs, reference, mask)
    rows = torch.arange(mask.shape[0], device=mask.device)
    at = last_true(mask)
    final = torch.zeros_like(rewards)
    final[rows, at] = scores.to(rewards.dtype)
    return rewards + torch.where(mask, final, 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns [b t] of each row's response tokens (Schulman et al. 2016, eq. 16); 0 where ``mask`` is False.

    ``values[b, t]`` is the value before token t; after the last True token the value is 0. The response may stand anywhere in its row.
    Returns are advantages + values, from advantages that are not whitened.
    """
    values = torch.where(mask, values, 0.0)
    rewards = torch.where(mask, rewards, 0.0)
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])
    carried = torch.zeros_like(following)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        carried = torch.where(mask[:, t], delta + gamma * lam * carried, 0.0)
        following = values[:, t]
        advantages[:, t] = carried
    return advantages, torch.where(mask, advantages + values, 0.0)
