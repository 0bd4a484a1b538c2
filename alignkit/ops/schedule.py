"""The learning rate over a stage, as a share of its peak. Plain numbers, no torch."""

from __future__ import annotations

import math


def schedule(step: int, total: int, *, warmup: float, decay: str, floor: float) -> float:
    """Share of the peak at ``step`` (0 is the first): a linear rise over the first ``warmup`` share of the steps, then the decay.

    ``decay``: constant, linear or cosine, from 1 down to ``floor`` (InstructGPT: cosine to 0.1).
    """
    rise = math.ceil(warmup * total)
    if step < rise:
        return (step + 1) / (rise + 1)
    if decay == "constant":
        return 1.0
    done = min((step - rise) / max(total - rise, 1), 1.0)
    share = 1.0 - done if decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return floor + (1.0 - floor) * share
