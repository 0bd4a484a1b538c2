"""Scoring with a trained reward model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from alignkit.api import Sample, Score, TokenBatch, TokenRow
from alignkit.checks import padding_changes_nothing
from alignkit.data.collate import collate, length_buckets

if TYPE_CHECKING:
    from alignkit.models.scalar import ScalarModel

_TOKENS = 8192  # of one forward without gradients
CHECKED_ROWS = 4
"""Rows that are scored a second time, with more padding, to see that it changes nothing."""


class TrainedReward:
    """Reads messages with the model's own tokenizer and template, so it may differ from the policy's."""

    def __init__(self, model: ScalarModel, *, checks: bool) -> None:
        self._model = model
        self._to_check = checks

    @torch.inference_mode()
    def score(self, samples: Sequence[Sample]) -> Sequence[Score]:
        """The scalar at the end-of-response token of each sample. A score that is not finite is no score."""
        rows = [self._model.codec.sample(sample) for sample in samples]
        if self._to_check and rows:
            padding_changes_nothing(self._model.scores, collate(rows[:CHECKED_ROWS]), exact=self._model.exact)
            self._to_check = False
        broken = Score(None, reason="the reward model's score is not finite")
        return [Score(value) if math.isfinite(value) else broken for value in scores_of(self._model, rows)]


@torch.inference_mode()
def scores_of(model: ScalarModel, rows: Sequence[TokenRow], collated: Callable[[Sequence[TokenRow]], TokenBatch] = collate) -> list[float]:
    """The score of each row, in order."""
    values = [0.0] * len(rows)
    for bucket in length_buckets([len(row) for row in rows], _TOKENS):
        for i, value in zip(bucket, model.scores(collated([rows[i] for i in bucket])).tolist(), strict=True):
            values[i] = value
    return values
