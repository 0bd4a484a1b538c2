"""Figures that are numbers: NaN and infinity must neither be learnt from nor be kept."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from alignkit.interfaces import State


def not_finite(states: Mapping[str, State]) -> str | None:
    """The name of a tensor with a NaN or an infinity in it, such as ``optimizer/weight/head.bias``; None when there is none."""
    return next(
        (f"{part}/{name}" for part, state in states.items() for name, tensor in state.tensors.items() if not _is_finite(tensor)),
        None,
    )


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # A NaN is the least and the greatest there is. To ask each number for itself takes ten times as long as to read them.
    least, greatest = tensor.aminmax()
    return math.isfinite(least) and math.isfinite(greatest)


def finite_rows(figures: Tensor, mask: Tensor) -> Tensor:
    """Whether all of ``figures`` [b t] under ``mask`` [b t] are finite, for each row [b]."""
    return torch.where(mask, figures, 0.0).isfinite().all(dim=1)
