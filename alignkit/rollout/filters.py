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


def filtered(logits: Tensor, filters: Sequence[Filters], temperatures: Sequence[float], drawn: Sequence[Sequence[int]]) -> Tensor:
    """The logits [n v] of rows from which their next tokens are drawn at temperature 1, -inf where they cannot be.

    ``drawn``: each row's response so far. At temperature 0 the likeliest token alone is left.
    """
    logits = torch.stack([_penalised(*each) for each in zip(logits.float(), filters, drawn, strict=True)])
    logits /= torch.tensor([temperature or 1.0 for temperature in temperatures], device=logits.device)[:, None]
    vocabulary = logits.shape[1]
    most = [1 if not temperature else one.top_k or vocabulary for one, temperature in zip(filters, temperatures, strict=True)]
    cut = [i for i, one in enumerate(filters) if most[i] < vocabulary or one.top_p < 1.0]
    if cut:
        bounds = [(most[i], filters[i].top_p) for i in cut]
        logits[cut] = _likeliest(logits[cut], bounds, min(vocabulary, max([_FEW, *(most for most, _ in bounds if most < vocabulary)])))
    return logits


def _penalised(logits: Tensor, filters: Filters, drawn: Sequence[int]) -> Tensor:
    counts = Counter(drawn) if filters.frequency_penalty or filters.presence_penalty else Counter()
    changes = {token: -(count * filters.frequency_penalty + filters.presence_penalty) for token, count in counts.items()}
    for token, bias in filters.bias:
        changes[token] = changes.get(token, 0.0) + bias
    if not changes:
        return logits
    places = torch.tensor(list(changes), device=logits.device)
    return logits.index_add(0, places, torch.tensor(list(changes.values()), device=logits.device))


def _likeliest(logits: Tensor, bounds: Sequence[tuple[int, float]], among: int) -> Tensor:
    """Rows [n v] with -inf but at the likeliest tokens: at most so many, and no more than have the wanted probability together.

    They are looked for ``among`` so many first, and among more if a row has not enough there.
    """
    most = torch.tensor([most for most, _ in bounds], device=logits.device)[:, None]
    share = torch.tensor([share for _, share in bounds], dtype=torch.float64, device=logits.device)[:, None]
    values, places = logits.topk(among)
    within = torch.arange(among, device=logits.device) < most
    of_most = torch.where(within, values, float("-inf")).logsumexp(dim=1)
    total = torch.where(most[:, 0] <= among, of_most, logits.logsumexp(dim=1))
    probabilities = (values - total[:, None]).double().exp()
    before = probabilities.cumsum(dim=1) - probabilities
    # The first one stays even if the share is 0: something must be drawn. Of a share of 1, rounding must not take any.
    left = within & ((before < share) | (share >= 1.0))
    left[:, 0] = True
    if among < logits.shape[1] and bool((left[:, -1] & (most[:, 0] > among)).any()):
        return _likeliest(logits, bounds, min(32 * among, logits.shape[1]))
    kept = torch.where(left, values, float("-inf"))
    return torch.full_like(logits, float("-inf")).scatter_(1, places, kept)
