"""Rows to batches: right-padded or packed, masks from lengths, microbatches that waste little padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from alignkit.interfaces import TokenBatch
from alignkit.types import TokenRow


def collate(rows: Sequence[TokenRow]) -> TokenBatch:
    """One batch, as wide as its longest row. Padding is id 0: masks come from lengths, so it does not matter which id pads."""
    shape = len(rows), max(map(len, rows))
    ids = torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.bool)
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row.ids)
        mask[i, : len(row)] = True
        loss_mask[i, : len(row)] = torch.tensor(row.loss_mask)
    return TokenBatch(ids, mask, loss_mask)


def best_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Bins of indices whose lengths add up to at most ``width``: longest first, each into the fullest bin that has room for it.

    What is longer than ``width`` has a bin to itself.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [b for b, left in enumerate(room) if left >= lengths[i]]
        if not fitting:
            bins.append([])
            room.append(width)
        chosen = min(fitting, key=lambda b: room[b]) if fitting else len(bins) - 1
        bins[chosen].append(i)
        room[chosen] -= lengths[i]
    return bins


def pack(bins: Sequence[Sequence[TokenRow]]) -> TokenBatch:
    """One row a bin, its documents one after the other; ``positions`` begin anew with each, and nothing predicts its first token."""
    joined = [
        TokenRow("", tuple(i for row in rows for i in row.ids), tuple(m for row in rows for m in (False, *row.loss_mask[1:])))
        for rows in bins
    ]
    batch = collate(joined)
    positions = torch.zeros_like(batch.ids)
    for i, rows in enumerate(bins):
        positions[i, : len(joined[i])] = torch.cat([torch.arange(len(row)) for row in rows])
    return replace(batch, positions=positions)


def length_buckets(lengths: Sequence[int], max_tokens: int, sizes: Sequence[int] | None = None) -> list[list[int]]:
    """Microbatches of indices: by length, so that little is padded, each at most ``max_tokens`` tokens with its padding.

    ``sizes``: how many rows each item stands for (the responses of a ranking, which stay together). An item that is too
    large by itself is a microbatch alone. Longest first: what memory is needed is known after the first microbatch.
    """
    sizes = sizes or [1] * len(lengths)
    buckets: list[list[int]] = []
    rows = widest = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not buckets or (rows + sizes[i]) * widest > max_tokens:
            buckets.append([])
            rows, widest = 0, lengths[i]
        buckets[-1].append(i)
        rows += sizes[i]
    return buckets
