"""The learning rate over a stage, as a share of its peak. Plain numbers, no torch."""

from __future__ import annotations

import math
from typing import Literal


def schedule(step: int, total: int, *, warmup: float, decay: Literal["constant", "linear", "cosine"], floor: float) -> float:
    """Share of the peak at ``step`` (0 is the first): a linear rise over the first ``warmup`` share of the steps, then the decay.

    ``decay``: constant, linear or cosine, from 1 down to ``floor`` (InstructGPT: cosine to 0.1). The rise starts at ``floor`` too
    (InstructGPT's PPO: from 0.1), or at one step's share of it where that is more, so that no step has a learning rate of 0.
    """
    rise = math.ceil(warmup * total)
    if step < rise:
        first = max(floor, 1.0 / (rise + 1))
        return first + (1.0 - first) * step / rise
    if decay == "constant":
        return 1.0
    done = min((step - rise) / max(total - rise, 1), 1.0)
    share = 1.0 - done if decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return floor + (1.0 - floor) * share
