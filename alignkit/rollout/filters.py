"""What may be done to a row's logits before a token is drawn from them. Each row has filters of its own, and touches no other row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_FEW = 64
"""The nucleus is looked for among so many tokens first: sorting a whole vocabulary takes longer than a small model's layer."""


@dataclass(frozen=True, slots=True)
class Filters:
    """In the order in which they are applied; temperature comes after ``bias``. The defaults do nothing.

    A token that the response holds c times loses c * ``frequency_penalty``, and ``presence_penalty`` if c > 0 (the formula of OpenAI's
    API). ``bias``: what is added to the logit of a token. ``top_k``: only so many of the likeliest tokens are left (0: all).
    ``top_p``: only the likeliest tokens are left whose probabilities add up to it (Holtzman et al. 2020).
    """

    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()
    top_k: int = 0
    top_p: float = 1.0


NONE = Filters()


def filtered(logits: Tensor, filters: Filters, temperature: float, drawn: Sequence[int]) -> Tensor:
    """The logits [v] of a row from which the next token is drawn at temperature 1, -inf where it cannot be.

    ``drawn``: the response so far. At temperature 0 the likeliest token alone is left.
    """
    logits = _penalised(logits.float(), filters, drawn)
    if temperature == 0.0:
        return _only(logits, logits.argmax()[None])
    logits = logits / temperature
    if 0 < filters.top_k < len(logits):
        logits = _only(logits, logits.topk(filters.top_k).indices)
    return _nucleus(logits, filters.top_p) if filters.top_p < 1.0 else logits


def _penalised(logits: Tensor, filters: Filters, drawn: Sequence[int]) -> Tensor:
    counts = Counter(drawn) if filters.frequency_penalty or filters.presence_penalty else Counter()
    changes = {token: -(count * filters.frequency_penalty + filters.presence_penalty) for token, count in counts.items()}
    for token, bias in filters.bias:
        changes[token] = changes.get(token, 0.0) + bias
    if not changes:
        return logits
    places = torch.tensor(list(changes), device=logits.device)
    return logits.index_add(0, places, torch.tensor(list(changes.values()), device=logits.device))


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    probabilities = logits.softmax(dim=0, dtype=torch.float64)
    for count in (min(_FEW, len(logits)), len(logits)):
        likeliest, places = probabilities.topk(count)
        before = likeliest.cumsum(dim=0) - likeliest
        if before[-1] >= top_p:  # the nucleus ends among them
            break
    # The first one stays even if top_p is 0: something must be drawn.
    return _only(logits, places[(before < top_p) | (before == 0.0)])


def _only(logits: Tensor, places: Tensor) -> Tensor:
    return torch.full_like(logits, float("-inf")).index_copy(0, places, logits[places])
