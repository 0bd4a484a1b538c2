"""Figures for metrics."""

from __future__ import annotations

import torch
from torch import Tensor

from alignkit.ops.losses import better_pairs
from alignkit.ops.masked import masked_mean


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the True cells: 1 is perfect, 0 is no better than a constant.

    Centred, so that values which are all off by the same amount lose nothing by it; 0 if the returns do not vary.
    """

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    spread = variance(returns)
    return torch.where(spread > 0, 1.0 - variance(returns - values) / spread.clamp(min=torch.finfo(spread.dtype).tiny), 0.0)


def pair_accuracy(rewards: Tensor, ranks: Tensor) -> Tensor:
    """Share of each prompt's pairs [n] whose better response has the higher reward; equal rewards count as wrong."""
    pairs = better_pairs(ranks)
    right = pairs & (rewards[:, :, None] > rewards[:, None, :])
    return right.sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp(min=1)


def pair_gaps(rewards: Tensor, ranks: Tensor) -> Tensor:
    """Reward of the better response less that of the worse [p], of every pair of ``rewards`` [n k] that ``ranks`` [n k] do not tie."""
    gaps = rewards[:, :, None] - rewards[:, None, :]
    return gaps[better_pairs(ranks)]


def calibration_error(gaps: Tensor, *, bins: int = 10) -> Tensor:
    """Expected calibration error of sigmoid(|gap|), the probability that a model gives to its own choice (Guo et al. 2017, eq. 3).

    ``gaps`` [p] as of ``pair_gaps``. The pairs fall into ``bins`` equal bins of that probability, from 0.5 to 1; the figure is the mean
    distance, over pairs, between a bin's mean probability and how often its choices are right. A gap of 0 chooses wrongly.
    """
    confidence = torch.sigmoid(gaps.abs())
    right = (gaps > 0).to(confidence.dtype)
    places = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    distance = torch.zeros(bins, dtype=confidence.dtype, device=gaps.device).index_add_(0, places, confidence - right)
    return distance.abs().sum() / max(len(gaps), 1)


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation of ``x`` [n] and ``y`` [n]; 0 where either does not vary."""
    x, y = x - x.mean(), y - y.mean()
    size = (x.square().sum() * y.square().sum()).sqrt()
    return torch.where(size > 0, (x * y).sum() / size.clamp(min=torch.finfo(size.dtype).tiny), 0.0)
