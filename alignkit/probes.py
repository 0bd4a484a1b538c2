"""A few sequences with their log-probabilities under a saved policy: whoever loads it later can compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from alignkit.data.collate import collate
from alignkit.interfaces import Policy
from alignkit.types import TokenRow

_PROBES = 4


def probes(policy: Policy, rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Of the first of ``rows``, for the manifest."""
    ids = [tuple(row.ids) for row in rows[:_PROBES]]
    batch = collate([TokenRow(str(i), row, (False,) + (True,) * (len(row) - 1)) for i, row in enumerate(ids)])
    with torch.no_grad():
        logprobs = policy.score_tokens(batch).logprobs
    return [{"ids": list(row), "logprobs": logprobs[i, 1 : len(row)].tolist()} for i, row in enumerate(ids)]
