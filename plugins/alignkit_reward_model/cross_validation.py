"""Does the model predict people it has not learnt from? K-fold cross-validation by groups of labelers (Ouyang et al. 2022)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.api import DataError, RankedRows

_KEPT_BACK = 10
"""One in so many rankings of each labeler is not trained on: it tells how well the same labelers are predicted."""


@dataclass(frozen=True, slots=True)
class Fold:
    """What is trained on; rankings by the same labelers that are not; rankings by the labelers that are held out."""

    labelers: tuple[str, ...]
    training: tuple[RankedRows, ...]
    same: tuple[RankedRows, ...]
    other: tuple[RankedRows, ...]


def labeler_groups(rankings: Sequence[RankedRows], folds: int) -> list[tuple[str, ...]]:
    """The labelers, dealt into ``folds`` groups of about as many rankings each: the busiest first, each to the smallest group.

    Raises ``DataError`` where a ranking does not say whose it is, or where there are fewer labelers than groups.
    """
    counts = Counter(ranking.labeler for ranking in rankings if ranking.labeler is not None)
    nameless = len(rankings) - sum(counts.values())
    if nameless:
        raise DataError(
            f"cross_validate: labeler needs to know whose each ranking is, and {nameless} of {len(rankings)} have no `labeler`; "
            "add the column, or set cross_validate: none"
        )
    if len(counts) < folds:
        raise DataError(f"cross_validate: labeler needs a labeler a fold or more; there are {len(counts)}, and folds is {folds}; lower it")

    groups: list[list[str]] = [[] for _ in range(folds)]
    sizes = [0] * folds
    for labeler, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        smallest = sizes.index(min(sizes))
        groups[smallest].append(labeler)
        sizes[smallest] += count
    return [tuple(group) for group in groups]


def split(rankings: Sequence[RankedRows], labelers: Sequence[str]) -> Fold:
    """The fold that holds ``labelers`` out."""
    seen: Counter[str | None] = Counter()
    training: list[RankedRows] = []
    same: list[RankedRows] = []
    for ranking in rankings:
        if ranking.labeler not in labelers:
            (training if seen[ranking.labeler] % _KEPT_BACK else same).append(ranking)
            seen[ranking.labeler] += 1
    return Fold(
        labelers=tuple(labelers),
        training=tuple(training),
        same=tuple(same),
        other=tuple(ranking for ranking in rankings if ranking.labeler in labelers),
    )


def cross_validate(folds: Sequence[Fold], accuracies: Callable[[Fold], tuple[float, float]]) -> dict[str, Any]:
    """Mean and standard error over the folds; ``accuracies`` trains on a fold and returns those on its ``same`` and ``other``."""
    found = [accuracies(fold) for fold in folds]
    same, other = ([pair[i] for pair in found] for i in (0, 1))
    return {
        "by": "labeler",
        "same_labelers": _mean_and_error(same),
        "other_labelers": _mean_and_error(other),
        "folds": [
            {
                "held_out": list(fold.labelers),
                "rankings_trained": len(fold.training),
                "rankings_same": len(fold.same),
                "rankings_other": len(fold.other),
                "accuracy_same": one,
                "accuracy_other": two,
            }
            for fold, (one, two) in zip(folds, found, strict=True)
        ],
    }


def _mean_and_error(values: Sequence[float]) -> dict[str, float]:
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return {"accuracy_mean": mean, "accuracy_standard_error": math.sqrt(variance / len(values))}
