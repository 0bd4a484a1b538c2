"""Made-up batches for the property tests: rows of a prompt, a response in one piece, and padding, with numbers in every cell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

GARBAGE = (float("nan"), float("inf"), -float("inf"), 1e9)


@dataclass(frozen=True)
class Ragged:
    """``mask`` [b t]: True at the response tokens. ``seed`` fixes the numbers, so that a failure can be repeated."""

    mask: Tensor
    seed: int

    def numbers(self, how_many: int, dtype: torch.dtype = torch.float64) -> Iterator[Tensor]:
        """Normal draws [b t]."""
        generator = torch.Generator().manual_seed(self.seed)
        return (torch.randn(self.mask.shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(how_many))

    def spoil(self, x: Tensor, garbage: float) -> Tensor:
        """``x`` with garbage where it does not count."""
        return torch.where(self.mask, x.detach(), garbage).requires_grad_(x.requires_grad)

    def widen(self, x: Tensor, fill: float, columns: int = 5) -> Tensor:
        """``x`` with more columns of padding on the right."""
        more = torch.full((len(x), columns), fill, dtype=x.dtype)
        return torch.cat([x.detach(), more], dim=1).requires_grad_(x.requires_grad)


@st.composite
def ragged(draw: st.DrawFn, min_tokens: int = 1) -> Ragged:
    """One to five rows of up to twelve columns; responses begin and end anywhere, and are at least ``min_tokens`` long."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(max(min_tokens, 1), 12))
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for row in mask:
        first = draw(st.integers(0, columns - min_tokens))
        row[first : draw(st.integers(first + min_tokens, columns))] = True
    return Ragged(mask, draw(st.integers(0, 2**31 - 1)))
