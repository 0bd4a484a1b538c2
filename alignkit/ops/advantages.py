"""From scores to advantages: token rewards with the KL penalty inside, and generalised advantage estimation."""

from __future__ import annotations

import torch
from torch import Tensor

from alignkit.ops.kl import k1
from alignkit.ops.masked import last_true


def penalize_missing_eos(scores: Tensor, finished: Tensor, *, penalty: float) -> Tensor:
    """``scores`` [b] less ``penalty`` where ``finished`` [b] is False: the response was cut off at its length limit.

    Subtracted, not put in the score's place as lm-human-preferences does: that would reward cutting off a response worse than it.
    """
    return torch.where(finished, scores, scores - penalty)


def kl_penalized_rewards(scores: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, *, coef: float) -> Tensor:
    """Token rewards [b t]: -coef * (log p - log q) everywhere, and the score [b] added at the last True token of its row.

    The score stands on the response's own last token, not one past it. A row without a True token gets no reward at all.
    """
    rewards = -coef * k1(logprobs, reference, mask)
    columns = torch.arange(mask.shape[1], device=mask.device)
    is_last = mask & (columns == last_true(mask)[:, None])
    return rewards + torch.where(is_last, scores[:, None].to(rewards.dtype), 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns [b t] of each row's response tokens (Schulman et al. 2016, eq. 16); 0 where ``mask`` is False.

    ``values[b, t]`` is the value before token t; after the last True token the value is 0. The response may stand anywhere in its row,
    in one piece. Returns are advantages + values, from advantages that are not whitened.
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
