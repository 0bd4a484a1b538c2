"""What validation tells of a reward model besides its loss: over all pairs and all responses that were held out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from alignkit.api import Metrics, RankedRows
from alignkit.ops.stats import calibration_error, correlation, pair_gaps

Scored = Sequence[tuple[RankedRows, Tensor]]
"""Rankings with the score of each response [k]."""

_GAPS = (0.5, 1.0, 2.0)
"""Where the buckets of |difference of rewards| part."""


def accuracy_by_labeler(rankings: Sequence[RankedRows], accuracies: Mapping[str, float]) -> Metrics:
    """Mean accuracy of the rankings of each known labeler; ``accuracies`` by the id of a ranking."""
    found: dict[str, list[float]] = {}
    for ranking in rankings:
        if ranking.labeler is not None:
            # A slash would make an area of a metric's name.
            found.setdefault(re.sub(r"[^\w-]", "_", ranking.labeler), []).append(accuracies[ranking.id])
    return {f"reward/accuracy_labeler.{name}": sum(values) / len(values) for name, values in sorted(found.items())}


def accuracy_by_gap(scored: Scored) -> Metrics:
    """How often the better response has the higher reward, by how far apart the two rewards are; calibration over all pairs.

    A pair counts as what its ranks say, also where a soft label makes it less than certain.
    """
    gaps = torch.cat([pair_gaps(scores[None], torch.tensor([ranking.ranks])) for ranking, scores in scored])
    edges = [0.0, *_GAPS, torch.inf]
    metrics = {"reward/gap_mean": float(gaps.mean()), "reward/calibration_error": float(calibration_error(gaps))}
    for low, high in pairwise(edges):
        inside = gaps[(gaps.abs() >= low) & (gaps.abs() < high)]
        if len(inside):
            name = f"{low:g}_to_{high:g}" if high < torch.inf else f"above_{low:g}"
            metrics[f"reward/accuracy_gap_{name}"] = float((inside > 0).float().mean())
            metrics[f"reward/share_gap_{name}"] = len(inside) / len(gaps)
    return metrics


def spread(scored: Scored) -> Metrics:
    """Size of the scores of all responses, and how far they follow length (in tokens)."""
    scores = torch.cat([one for _, one in scored])
    lengths = torch.tensor([float(sum(row.loss_mask)) for ranking, _ in scored for row in ranking.rows])
    return {
        "reward/score_mean": float(scores.mean()),
        "reward/score_std": float(scores.std(correction=0)),
        "reward/score_min": float(scores.min()),
        "reward/score_max": float(scores.max()),
        "reward/length_correlation": float(correlation(scores, lengths)),
    }
