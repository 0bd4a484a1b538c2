"""Averages that never see a masked cell. Masks are True where a cell counts."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of ``x`` over the True cells of ``mask``; whatever stands elsewhere, NaN included, has no influence and no gradient.

    Only the True cells are added up, so that padding cannot change even the order of rounding.
    """
    return x.masked_select(mask).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``x`` over the True cells of ``mask``; 0 when there is none."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def masked_whiten(x: Tensor, mask: Tensor, *, center: bool = True, eps: float = 1e-8) -> Tensor:
    """``x`` scaled to unit variance over the True cells, and to mean 0 when ``center``; 0 elsewhere.

    The variance is the biased one (lm-human-preferences ``whiten``), over the whole batch at once.
    """
    # Cleaned before any arithmetic: a NaN that is masked afterwards would still be in the gradient.
    x = torch.where(mask, x, 0.0)
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(variance + eps)
    return torch.where(mask, whitened if center else whitened + mean, 0.0)


def last_true(mask: Tensor) -> Tensor:
    """Column [b] of the last True cell of each row of ``mask`` [b t]; 0 for a row without one."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, columns, 0).amax(dim=1)
