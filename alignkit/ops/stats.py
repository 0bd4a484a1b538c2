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
