"""Keys and values of the rows being decoded, in one block that is written in place: rows join at the end and leave from anywhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alignkit.models.attention import PAST_BLOCK, Apart, Layout, attend_to_past

_ROWS = 8


class Cache:
    """``lengths`` [n]: how many tokens of each row are stored, its first at column 0. Keys and values: [layers rows heads columns d].

    It is also the ``Attention`` of a decoding step, in which each row has one new token.
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        self._layers = layers
        self._keys = self._values = torch.empty(layers, 0, 0, 0, 0, device=device)
        self.lengths = torch.zeros(0, dtype=torch.long, device=device)
        self._width = 0  # of the step in progress
        self._at = self._unseen = torch.empty(0)  # of the step: where its keys go [n*heads]; columns that a row has not come to [n width]

    def __len__(self) -> int:
        return len(self.lengths)

    def begin_step(self) -> None:
        """Every row is about to get one token more; ``lengths`` counts it already."""
        self.lengths += 1
        self._width = _whole_blocks(int(self.lengths.max()))
        self._reserve(len(self), self._width)
        heads, columns = self._keys.shape[2:4]
        rows = torch.arange(len(self) * heads, device=self.lengths.device)
        self._at = rows * columns + (self.lengths - 1).repeat_interleave(heads)
        self._unseen = torch.arange(self._width, device=self.lengths.device) >= self.lengths[:, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
        """Store the new tokens' keys and values, and let the tokens look at all of their rows."""
        keys, values = self._keys[layer], self._values[layer]
        for block, new in ((keys, key), (values, value)):
            block.view(-1, block.shape[-1]).index_copy_(0, self._at, new.reshape(-1, block.shape[-1]).to(block.dtype))
        unseen, width = self._unseen, self._width
        if window is not None and window < width:
            unseen = unseen | (torch.arange(width, device=key.device) < (self.lengths - window)[:, None])
        return attend_to_past(query, keys[: len(self), :, :width], values[: len(self), :, :width], unseen, scale)

    def prefill(self, layout: Layout | Apart, lengths: Tensor) -> Prefill:
        """The ``Attention`` of the forward in which ``layout``'s rows, of ``lengths`` tokens each, join below those that are there."""
        start, self.lengths = len(self), torch.cat([self.lengths, lengths])
        self._reserve(len(self), layout.line.shape[1])
        return Prefill(self, layout, start)

    def store(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [m heads columns d] of row ``start`` and those below it."""
        if not self._keys.numel():
            self._allocate(values)
        rows, columns = slice(start, start + len(keys)), slice(keys.shape[2])
        self._keys[layer, rows, :, columns] = keys
        self._values[layer, rows, :, columns] = values

    def remove(self, row: int) -> None:
        """Forget a row; the last one takes its place."""
        last = len(self) - 1
        if row < last:
            columns = slice(int(self.lengths[last]))
            for block in (self._keys, self._values):
                block[:, row, :, columns] = block[:, last, :, columns]
            self.lengths[row] = self.lengths[last]
        self.lengths = self.lengths[:last]

    def _allocate(self, like: Tensor) -> None:
        _, heads, _, d = like.shape
        rows, columns = self._keys.shape[1], self._keys.shape[3]
        self._keys = like.new_empty(self._layers, rows, heads, columns, d)
        # A weight of 0 times what was left in memory would be NaN if that is.
        self._values = like.new_zeros(self._layers, rows, heads, columns, d)

    def _reserve(self, rows: int, columns: int) -> None:
        """Room for so many rows and columns; what is stored stays."""
        _, had_rows, heads, had_columns, d = self._keys.shape
        if rows <= had_rows and columns <= had_columns:
            return
        rows = max(rows, had_rows) if rows <= had_rows else rows + _ROWS
        columns = had_columns if columns <= had_columns else _whole_blocks(max(columns + PAST_BLOCK, columns * 3 // 2))
        keys, values = self._keys, self._values
        self._keys = keys.new_empty(self._layers, rows, heads, columns, d)
        self._values = values.new_zeros(self._layers, rows, heads, columns, d)
        if keys.numel():
            self._keys[:, :had_rows, :, :had_columns] = keys
            self._values[:, :had_rows, :, :had_columns] = values


def _whole_blocks(columns: int) -> int:
    return -(-columns // PAST_BLOCK) * PAST_BLOCK


@dataclass(frozen=True, slots=True)
class Prefill:
    """The ``Attention`` of prompts: as in training, and their keys and values are kept."""

    cache: Cache
    layout: Layout | Apart
    start: int

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
        """Store what the rows need later, and attend."""
        line = self.layout.line
        keys, values = (x.index_select(0, line.flatten()).unflatten(0, line.shape).transpose(1, 2) for x in (key, value))
        self.cache.store(layer, self.start, keys, values)
        return self.layout.attend(layer, query, key, value, scale, window)
