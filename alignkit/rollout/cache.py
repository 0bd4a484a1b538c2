"""Keys and values of the rows being decoded: right-aligned in one preallocated block a layer, so that rows may join and leave."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

_GROWTH = 64


# transformers is not type-checked with us (its types do not pass strict), so to mypy its classes are Any.
class RowsLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values [rows heads columns width], kept in a block with room to grow to the right."""

    def __init__(self) -> None:
        super().__init__()
        self._block: tuple[Tensor, Tensor] | None = None
        self._columns = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Append new columns; returns all keys and values so far, as views of the block."""
        new = key_states.shape[-2]
        if self._block is None or self._columns + new > self._block[0].shape[-2]:
            self._block = (self._grown(0, key_states), self._grown(1, value_states))
        for block, states in zip(self._block, (key_states, value_states), strict=True):
            block[:, :, self._columns : self._columns + new] = states
        self._columns += new
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.values = (block[:, :, : self._columns] for block in self._block)
        return self.keys, self.values

    def _grown(self, which: int, states: Tensor) -> Tensor:
        rows, heads, new, width = states.shape
        block = states.new_zeros(rows, heads, self._columns + new + _GROWTH, width)
        if self._block is not None:
            block[:, :, : self._columns] = self._block[which][:, :, : self._columns]
        return block

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Hold exactly these keys and values."""
        self._block, self._columns = (keys, values), keys.shape[-2]
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True


def new_cache(layers: int) -> DynamicCache:
    """An empty cache."""
    cache = DynamicCache()
    cache.layers = [RowsLayer() for _ in range(layers)]
    return cache


def select(cache: DynamicCache, rows: Tensor, first_column: int) -> None:
    """Keep ``rows`` only, and drop the columns before ``first_column``, which none of them uses."""
    for layer in cache.layers:
        layer.replace(layer.keys[rows, :, first_column:], layer.values[rows, :, first_column:])


def join(cache: DynamicCache, other: DynamicCache) -> None:
    """Put the rows of ``other`` below those of ``cache``; the narrower of the two is padded on the left."""
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        width = max(mine.keys.shape[-2], theirs.keys.shape[-2])
        mine.replace(
            *(torch.cat([_widen(a, width), _widen(b, width)]) for a, b in ((mine.keys, theirs.keys), (mine.values, theirs.values)))
        )


def _widen(states: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(states, (0, 0, width - states.shape[-2], 0))
