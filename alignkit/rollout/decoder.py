"""Token by token: rows join at any step, carry their own sampling parameters, and leave when they are done.

``add`` a request, ``step`` until ``busy`` is False; a rollout adds all its requests first, a server adds them as they come.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from alignkit.data.collate import collate, length_buckets
from alignkit.models.attention import lay_apart, lay_out
from alignkit.models.decoding import Decoding
from alignkit.rollout.cache import Cache
from alignkit.rollout.filters import NONE, Filters, filtered
from alignkit.rollout.noise import draw, uniforms
from alignkit.types import TokenRow

PREFILL_TOKENS = 8192
"""Prompt tokens of one step: enough to keep a processor busy, and what bounds a prefill's memory."""


@dataclass(frozen=True, slots=True)
class Request:
    """One response to draw. ``noise_key`` fixes its randomness wherever and whenever it is drawn.

    ``report``: None, or of how many of the likeliest tokens the model's own log-probabilities are wanted, besides the drawn token's.
    """

    ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    stop_ids: tuple[int, ...]
    noise_key: int
    filters: Filters = NONE
    report: int | None = None

    @property
    def plain(self) -> bool:
        """Whether tokens are drawn from softmax(logits / temperature), with nothing done to it."""
        return self.temperature > 0.0 and self.filters == NONE


@dataclass(frozen=True, slots=True)
class Event:
    """One new token of a request; ``finished`` says why it is the last one.

    ``logprob``: of the distribution it was drawn from. ``raw``, where the request wants a report: of the model's own (temperature 1, no
    filters); ``likeliest``: tokens with theirs, the likeliest first.
    """

    request: int
    token: int
    logprob: float
    finished: Literal["stop", "length"] | None
    raw: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


class Decoder:
    """Decodes with the model that a policy's ``decoding()`` gives.

    At most ``max_rows`` requests are decoded at once; the others wait and come in as they came, prompts of about ``prefill_tokens``
    tokens a step. Row i of the cache is that of ``_rows[i]``; a row that is done is gone at once, so that no step computes for it.
    ``together``: of prompts that come in at once, what several begin with is computed once; otherwise no number of a response depends on
    who else is there (given products that do not either).
    """

    def __init__(self, model: Decoding, *, max_rows: int, prefill_tokens: int = PREFILL_TOKENS, together: bool = True) -> None:
        self._model = model
        self._max_rows = max_rows
        self._prefill_tokens = prefill_tokens
        self._together = together
        self._device = model.device
        self._cache = Cache(model.layers, model.device)
        self._waiting: dict[int, Request] = {}
        self._rows: list[_Row] = []
        self._next = 0

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._rows or self._waiting)

    @property
    def rows(self) -> int:
        """How many requests are being decoded."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """How many have not come in yet."""
        return len(self._waiting)

    def add(self, request: Request) -> int:
        """Queue a request; its number names it in events."""
        number, self._next = self._next, self._next + 1
        self._waiting[number] = request
        return number

    @torch.inference_mode()
    def cancel(self, number: int) -> None:
        """Forget a request; a finished or unknown one is ignored."""
        self._waiting.pop(number, None)
        self._remove([i for i, row in enumerate(self._rows) if row.number == number])

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One token for every row being decoded, and the first one for the requests that now find room."""
        events = self._decode() if self._rows else []
        return events + self._admit()

    @torch.inference_mode()
    def score(self, ids: Sequence[int]) -> list[float]:
        """Log-probabilities (temperature 1, nats) of the tokens of a sequence but its first, by the products that answer requests."""
        batch = collate([TokenRow("", tuple(ids), (True,) * len(ids))])
        layout = lay_out(batch).to(self._device)
        line = batch.ids.to(self._device).flatten()[layout.tokens]
        logits = self._model.logits(self._model.hidden(line, layout.positions, layout)[:-1])
        scores: list[float] = logits.float().log_softmax(dim=-1).gather(1, line[1:, None]).squeeze(1).tolist()
        return scores

    def _decode(self) -> list[Event]:
        tokens = torch.tensor([row.tokens[-1] for row in self._rows], device=self._device)
        self._cache.begin_step()
        hidden = self._model.hidden(tokens, self._cache.lengths - 1, self._cache)
        return self._sample(hidden, 0)

    def _admit(self) -> list[Event]:
        chosen = list(self._next_in_line())
        lengths = [len(self._waiting[number].ids) for number in chosen]
        events = []
        for bucket in length_buckets(lengths, self._prefill_tokens):
            events += self._prefill([(chosen[i], self._waiting.pop(chosen[i])) for i in bucket])
        return events

    def _next_in_line(self) -> Iterator[int]:
        """Who comes in now: as many as find room, and whose prompts are computed in one step; one prompt always is."""
        room, tokens = self._max_rows - len(self._rows), self._prefill_tokens
        for number, request in self._waiting.items():
            if room == 0 or tokens <= 0:
                return
            yield number
            room, tokens = room - 1, tokens - len(request.ids)

    def _prefill(self, requests: Sequence[tuple[int, Request]]) -> list[Event]:
        """Compute prompts, and draw the first tokens."""
        batch = collate([TokenRow("", request.ids, (True,) * len(request.ids)) for _, request in requests])
        layout = lay_out(batch).to(self._device) if self._together else lay_apart(batch, self._device)
        lengths = torch.tensor([len(request.ids) for _, request in requests], device=self._device)
        attention = self._cache.prefill(layout, lengths)
        hidden = self._model.hidden(batch.ids.to(self._device).flatten()[layout.tokens], layout.positions, attention)
        ends = layout.line.gather(1, lengths[:, None] - 1).squeeze(1)
        start = len(self._rows)
        self._rows += [_Row(number, request) for number, request in requests]
        return self._sample(hidden[ends], start)

    def _sample(self, hidden: Tensor, start: int) -> list[Event]:
        """Draw the next token of row ``start`` and those below it, from their hidden states, and let finished rows go."""
        rows = self._rows[start:]
        logits = self._model.logits(hidden)
        keys = torch.tensor([row.request.noise_key for row in rows], device=self._device)
        counts = torch.tensor([len(row.tokens) for row in rows], device=self._device)
        # What is filtered has been divided by its temperature.
        temperatures = torch.tensor([row.request.temperature if row.request.plain else 1.0 for row in rows], device=self._device)
        drawn, scores = draw(_filtered(logits, rows), uniforms(keys, counts), temperatures)
        events = [row.take(*found) for row, *found in zip(rows, drawn.tolist(), scores.tolist(), strict=True)]
        events = _reported(events, logits, rows)
        self._remove([start + i for i, event in enumerate(events) if event.finished])
        return events

    def _remove(self, rows: Sequence[int]) -> None:
        """Rows leave; each time the last one takes the place."""
        for i in sorted(rows, reverse=True):
            self._cache.remove(i)
            last = self._rows.pop()
            if i < len(self._rows):
                self._rows[i] = last


@dataclass(slots=True)
class _Row:
    """A request that is being decoded, and its response so far."""

    number: int
    request: Request
    tokens: list[int] = field(default_factory=list)

    def take(self, token: int, logprob: float) -> Event:
        """The row's next token."""
        self.tokens.append(token)
        finished: Literal["stop", "length"] | None = None
        if token in self.request.stop_ids:
            finished = "stop"
        elif len(self.tokens) == self.request.max_new_tokens:
            finished = "length"
        return Event(self.number, token, logprob, finished)


def _filtered(logits: Tensor, rows: Sequence[_Row]) -> Tensor:
    """``logits`` [n v] with the filters of those rows that have some."""
    if all(row.request.plain for row in rows):
        return logits
    special = [i for i, row in enumerate(rows) if not row.request.plain]
    requests = [rows[i].request for i in special]
    logits = logits.float().clone()
    logits[special] = filtered(
        logits[special], [one.filters for one in requests], [one.temperature for one in requests], [rows[i].tokens for i in special]
    )
    return logits


def _reported(events: list[Event], logits: Tensor, rows: Sequence[_Row]) -> list[Event]:
    """The events, with the model's own log-probabilities for the rows that want them. ``logits`` [n v]."""
    wanted = [i for i, row in enumerate(rows) if row.request.report is not None]
    if not wanted:
        return events
    own = logits[wanted].float().log_softmax(dim=-1)
    drawn = own.gather(1, torch.tensor([[events[i].token] for i in wanted], device=own.device)).squeeze(1).tolist()
    count = max(rows[i].request.report or 0 for i in wanted)
    best = own.topk(count)
    for i, raw, values, tokens in zip(wanted, drawn, best.values.tolist(), best.indices.tolist(), strict=True):
        likeliest = tuple(zip(tokens, values, strict=True))[: rows[i].request.report]
        events[i] = replace(events[i], raw=raw, likeliest=likeliest)
    return events
