"""Figures by which a policy that pleases the reward, and nothing else, gives itself away. Pure functions; tokens are ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

_REPEATS = 3
"""So often an n-gram must occur in a response to count as repeated: twice may be style."""


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation of two equally long sequences, equal values sharing their mean rank; 0 where either does not vary."""
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 0 else 0.0


def _ranks(values: Sequence[float]) -> NDArray[np.float64]:
    _, places, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    last = counts.cumsum()
    means: NDArray[np.float64] = last - (counts - 1) / 2.0
    return means[places]


def distinct_share(tokens: Sequence[int], n: int = 3) -> float:
    """Different n-grams among all n-grams of a response: 1 where none occurs twice, and where there is none."""
    grams = _grams(tokens, n)
    return len(set(grams)) / len(grams) if grams else 1.0


def repeated_share(tokens: Sequence[int], n: int = 3) -> float:
    """Tokens of a response that lie in an occurrence of its most frequent n-gram, as a share; 0 unless that occurs three times."""
    grams = _grams(tokens, n)
    if not grams:
        return 0.0
    most, count = Counter(grams).most_common(1)[0]
    if count < _REPEATS:
        return 0.0
    return len({i + k for i, gram in enumerate(grams) if gram == most for k in range(n)}) / len(tokens)


def is_repetitive(tokens: Sequence[int]) -> bool:
    """Fewer than 30% of its 3-grams are different, or one of them covers more than 30% of it."""
    return distinct_share(tokens) < 0.3 or repeated_share(tokens) > 0.3


def duplicate_share(prompts: Sequence[Hashable], responses: Sequence[Hashable]) -> float:
    """Responses that were also given to another prompt, as a share."""
    askers: dict[Hashable, set[Hashable]] = {}
    for prompt, response in zip(prompts, responses, strict=True):
        askers.setdefault(response, set()).add(prompt)
    return sum(len(askers[response]) > 1 for response in responses) / len(responses) if responses else 0.0


def _grams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))
