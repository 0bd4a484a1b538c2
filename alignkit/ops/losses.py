"""Losses. Each is a sum divided by a count that the caller passes, so that microbatches of one step share one denominator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alignkit.ops.masked import last_true, masked_sum


def nll_loss(logprobs: Tensor, mask: Tensor, *, tokens_in_step: float) -> Tensor:
    """Negative log-likelihood of the True tokens over ``tokens_in_step`` (the trained tokens of the whole optimizer step)."""
    return -masked_sum(logprobs, mask) / max(tokens_in_step, 1)


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip: float, tokens_in_minibatch: float
) -> Tensor:
    """PPO's clipped surrogate, summed over True cells of ``mask`` [b t] and divided by ``tokens_in_minibatch`` (Schulman 2017, eq. 7)."""
    plain, clipped = _surrogates(logprobs, old_logprobs, advantages, mask, clip)
    return masked_sum(torch.maximum(plain, clipped), mask) / max(tokens_in_minibatch, 1)


def clipped_share(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip: float, tokens_in_minibatch: float
) -> Tensor:
    """Tokens that clipping robs of their gradient, over ``tokens_in_minibatch``: they had moved far enough in the wanted direction.

    Not the tokens whose ratio is out of bounds: those on the wrong side keep their gradient.
    """
    plain, clipped = _surrogates(logprobs, old_logprobs, advantages, mask, clip)
    return masked_sum((clipped > plain).to(plain.dtype), mask) / max(tokens_in_minibatch, 1)


def _surrogates(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Each token's loss [b t], with the ratio as it is and with the ratio clipped."""
    # Masked before exp: infinity times 0 would be NaN.
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()
    gain = torch.where(mask, advantages, 0.0)
    return -gain * ratio, -gain * ratio.clamp(1.0 - clip, 1.0 + clip)


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None, tokens_in_minibatch: float
) -> Tensor:
    """Half the squared error of the values, the worse of clipped and not when ``clip`` is given, over ``tokens_in_minibatch``."""
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    error = (values - returns) ** 2
    if clip is not None:
        error = torch.maximum(error, (old_values + (values - old_values).clamp(-clip, clip) - returns) ** 2)
    return 0.5 * masked_sum(error, mask) / max(tokens_in_minibatch, 1)


def clipped_value_share(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float, tokens_in_minibatch: float
) -> Tensor:
    """Tokens whose value had moved further than ``clip`` to the better, so that it is not moved on, over ``tokens_in_minibatch``."""
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    held = (old_values + (values - old_values).clamp(-clip, clip) - returns) ** 2 > (values - returns) ** 2
    return masked_sum(held.to(values.dtype), mask) / max(tokens_in_minibatch, 1)


def score_index(mask: Tensor) -> Tensor:
    """Where a reward is read [b]: the last True column of ``mask`` [b t], whatever side the padding is on."""
    return last_true(mask)


def better_pairs(ranks: Tensor) -> Tensor:
    """[n k k] bool, True at (i, j) where response i is ranked better than j. Rank 1 is best; 0 means that there is no response."""
    present = ranks > 0
    return (ranks[:, :, None] < ranks[:, None, :]) & present[:, :, None] & present[:, None, :]


def kwise_loss(
    rewards: Tensor,
    ranks: Tensor,
    *,
    margin: Tensor | float = 0.0,
    preference: Tensor | None = None,
    center: float = 0.0,
) -> Tensor:
    """The ranking loss of each prompt [n]: the mean over its pairs of -log sigmoid(better - worse - margin) (Ouyang et al. 2022, eq. 1).

    ``rewards`` [n k], ``ranks`` [n k] (1 best, equal is a tie, 0 is no response). Tied pairs are left out, and the mean is over the pairs
    that remain; a prompt without a pair has loss 0. With two responses this is the pairwise loss (Bradley and Terry 1952).
    ``margin`` [n] in units of reward (Llama 2). ``preference`` [n], NaN where there is none: the probability that the better-ranked
    of two is the better one (soft label). ``center``: weight of the mean squared sum of a pair's rewards (arXiv:2312.09244).
    """
    pairs = better_pairs(ranks)
    # An absent response may hold anything, and must not reach the gradient of those that are there.
    rewards = torch.where(ranks > 0, rewards, 0.0)
    gap = rewards[:, :, None] - rewards[:, None, :]
    wide = torch.as_tensor(margin, dtype=rewards.dtype, device=rewards.device).reshape(-1, 1, 1)
    loss = -F.logsigmoid(gap - wide)
    if preference is not None:
        soft = preference.to(rewards.dtype).nan_to_num(1.0).reshape(-1, 1, 1)
        loss = soft * loss - (1.0 - soft) * F.logsigmoid(-gap - wide)
    if center:
        loss = loss + center * (rewards[:, :, None] + rewards[:, None, :]) ** 2
    return torch.where(pairs, loss, 0.0).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp(min=1)
