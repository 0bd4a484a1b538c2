"""Rows to batches: right-padded, masks from lengths, microbatches that waste little padding."""

from __future__ import annotations

import math
from collections.abc import Sequence

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


# What a microbatch costs besides its tokens, in tokens: below this, splitting further to save padding does not pay.
_FIXED_COST = 64


def length_buckets(lengths: Sequence[int], max_tokens: int, sizes: Sequence[int] | None = None) -> list[list[int]]:
    """Microbatches of indices: by length, so that as little as possible is padded, each at most ``max_tokens`` tokens with its padding.

    ``sizes``: how many rows each item stands for (the responses of a ranking, which stay together). An item that is too
    large by itself is a microbatch alone. Longest first: what memory is needed is known after the first microbatch.
    """
    rows = sizes or [1] * len(lengths)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    # least[k]: the cheapest way to split the k longest items, and where its last microbatch begins.
    least: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(order) + 1):
        count, best = 0, (math.inf, 0)
        for start in range(end - 1, -1, -1):
            count += rows[order[start]]
            cells = count * lengths[order[start]]
            if cells > max_tokens and start < end - 1:
                break
            best = min(best, (least[start][0] + cells + _FIXED_COST, start))
        least.append(best)
    buckets: list[list[int]] = []
    end = len(order)
    while end:
        start = least[end][1]
        buckets.insert(0, order[start:end])
        end = start
    return buckets
