"""Responses of given lengths from transformers' generate, their log-probabilities untouched."""

from __future__ import annotations

from typing import Any

import torch
from transformers import StoppingCriteria


class Lengths(StoppingCriteria):
    """Ends each row at its length; ``drawn`` counts the tokens that were drawn for rows that had not ended."""

    # transformers fills ended rows with padding only where some criterion has such an attribute.
    eos_token_id = None

    def __init__(self, prompt: int, lengths: torch.Tensor) -> None:
        self._prompt, self._lengths = prompt, lengths
        self.drawn = 0

    def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        now = ids.shape[1] - self._prompt
        self.drawn += int((self._lengths >= now).sum())
        return now >= self._lengths
