"""Keys and values of the rows being decoded, in one block that is written in place: rows join at the end and leave from anywhere."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignkit.models.attention import PAST_BLOCK, Apart, Layout, attend_to_past
from alignkit.models.transfer import listed

_ROWS = 8
_AHEAD = {"cpu": 0, "cuda": 256}
"""Columns for tokens that are yet to come: where there is a place for them already, no graph need be recorded for another one."""


class Cache:
    """Keys and values: [layers rows heads columns d], of each row its tokens from column 0 on.

    How many tokens a row has is known on both sides: here, for nobody to wait for the device to say it, and there, in ``lengths``
    [max_rows], for the device not to wait either. It is also the ``Attention`` of a decoding step, in which each row has one new token.
    """

    def __init__(self, layers: int, device: torch.device, max_rows: int) -> None:
        self._layers = layers
        self._keys = self._values = torch.empty(layers, 0, 0, 0, 0, device=device)
        self._stored: list[int] = []
        self.lengths = torch.zeros(max_rows, dtype=torch.long, device=device)
        self._at = self._bias = torch.empty(0)  # of the step: where its keys go [n*heads]; -inf where a row looks at nothing [n width]

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def place(self) -> Hashable:
        """Where the block is, and how large."""
        return self._keys.data_ptr(), self._keys.shape

    @property
    def rows(self) -> int:
        """How many rows there is memory for."""
        return self._keys.shape[1]

    @property
    def width(self) -> int:
        """The columns that a step looks at. A GPU looks at all: another width would be another graph."""
        return self._keys.shape[3] if self._keys.is_cuda else _whole_blocks(max(self._stored))

    def grow(self) -> None:
        """Make room for every row's next token."""
        self._stored = [length + 1 for length in self._stored]
        self._reserve(len(self), _whole_blocks(max(self._stored)))

    def begin_step(self, rows: int) -> None:
        """On the device, the first so many rows get one token more. Those beyond ``len`` have left, or are yet to come; what is computed
        for them is not read.
        """
        heads, columns = self._keys.shape[2:4]
        # Of a row that has left, too, the last token must see something: NaN would stay in memory for the row that comes.
        lengths = self.lengths[:rows].add_(1).clamp_(max=columns)
        places = torch.arange(rows * heads, device=lengths.device) * columns
        self._at = places + (lengths - 1).repeat_interleave(heads, output_size=rows * heads)
        self._bias = _bias(torch.arange(self.width, device=lengths.device) >= lengths[:, None], self._keys.dtype)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
        """Store the new tokens' keys and values, and let the tokens look at all of their rows."""
        keys, values, rows, width = self._keys[layer], self._values[layer], len(query), self.width
        for block, new in ((keys, key), (values, value)):
            block.view(-1, block.shape[-1]).index_copy_(0, self._at, new.reshape(-1, block.shape[-1]).to(block.dtype))
        bias = self._bias
        if window is not None and window < width:
            gone = torch.arange(width, device=key.device) < (self.lengths[:rows] - window)[:, None]
            bias = bias + _bias(gone, bias.dtype)
        return attend_to_past(query, keys[:rows, :, :width], values[:rows, :, :width], bias, scale)

    def prefill(self, layout: Layout | Apart, lengths: Sequence[int], more: int) -> Prefill:
        """The ``Attention`` of the forward in which ``layout``'s rows, of ``lengths`` tokens each, join below those that are there. None
        will get more than ``more`` tokens.
        """
        start = len(self)
        self._stored.extend(lengths)
        self.lengths[start : len(self)] = listed(lengths, self.lengths.device)
        self._reserve(len(self), layout.line.shape[1] + min(more, _AHEAD[self.lengths.device.type]))
        return Prefill(self, layout, start)

    def store(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [m heads columns d] of row ``start`` and those below it."""
        if not self._keys.numel():
            self._allocate(values)
        rows, columns = slice(start, start + len(keys)), slice(keys.shape[2])
        self._keys[layer, rows, :, columns] = keys
        self._values[layer, rows, :, columns] = values

    def move(self, to: Sequence[int], origin: Sequence[int], left: int) -> None:
        """Rows ``origin`` take the places ``to``, of rows that go; ``left`` are left."""
        if to:
            columns = slice(max(self._stored[i] for i in origin))
            there, here = listed(to, self.lengths.device), listed(origin, self.lengths.device)
            for block in (self._keys, self._values):
                block[:, there, :, columns] = block[:, here, :, columns]
            self.lengths[there] = self.lengths[here]
        for i, j in zip(to, origin, strict=True):
            self._stored[i] = self._stored[j]
        del self._stored[left:]

    def _allocate(self, like: Tensor) -> None:
        _, heads, _, d = like.shape
        shape = self._layers, self._keys.shape[1], heads, self._keys.shape[3], d
        # The CPU's products of many small matrices are those of float32: in bfloat16 it would copy all of the past first, in each step.
        dtype = like.dtype if like.is_cuda else torch.float32
        # Nothing is looked at where nothing was stored, but what is left in memory may be NaN, and with a weight of 0 that is NaN still.
        self._keys, self._values = (like.new_zeros(shape, dtype=dtype) for _ in range(2))

    def _reserve(self, rows: int, columns: int) -> None:
        """Room for so many rows and columns; what is stored stays."""
        _, had_rows, heads, had_columns, d = self._keys.shape
        if rows <= had_rows and columns <= had_columns:
            return
        rows = had_rows if rows <= had_rows else rows + _ROWS
        if 0 < had_columns < columns:  # seldom
            columns = max(columns + PAST_BLOCK, columns * 3 // 2)
        columns = max(_whole_blocks(columns), had_columns)
        had = self._keys, self._values
        self._keys, self._values = (block.new_zeros(self._layers, rows, heads, columns, d) for block in had)
        if had[0].numel():
            self._keys[:, :had_rows, :, :had_columns], self._values[:, :had_rows, :, :had_columns] = had


def _whole_blocks(columns: int) -> int:
    return -(-columns // PAST_BLOCK) * PAST_BLOCK


def _bias(unseen: Tensor, dtype: torch.dtype) -> Tensor:
    """-inf where ``unseen`` is True, else 0."""
    return torch.zeros_like(unseen, dtype=dtype).masked_fill_(unseen, float("-inf"))


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
