"""Token by token: rows join at any step, carry their own sampling parameters, and leave when they are done.

``add`` a request, ``step`` until ``busy`` is False; a rollout adds all its requests first, a server adds them as they come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from alignkit.data.collate import collate, length_buckets
from alignkit.models.attention import lay_out
from alignkit.models.decoding import Decoding
from alignkit.rollout.cache import Cache
from alignkit.rollout.noise import draw, uniforms
from alignkit.types import TokenRow

_PREFILL_TOKENS = 8192
"""Prompt tokens of one forward: enough to keep a processor busy, and what bounds a prefill's memory."""


@dataclass(frozen=True, slots=True)
class Request:
    """One response to draw. ``noise_key`` fixes its randomness wherever and whenever it is drawn."""

    ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    stop_ids: tuple[int, ...]
    noise_key: int


@dataclass(frozen=True, slots=True)
class Event:
    """One new token of a request; ``finished`` says why it is the last one."""

    request: int
    token: int
    logprob: float
    finished: Literal["stop", "length"] | None


class Decoder:
    """Decodes with the model that a policy's ``decoding()`` gives.

    At most ``max_rows`` requests are decoded at once; the others wait, longest prompt first, so that prompts of about one length are
    prefilled together. Row i of the cache is that of ``_rows[i]``; a row that is done is gone at once, so that no step computes for it.
    """

    def __init__(self, model: Decoding, *, max_rows: int) -> None:
        self._model = model
        self._max_rows = max_rows
        self._device = model.device
        self._cache = Cache(model.layers, model.device)
        self._waiting: dict[int, Request] = {}
        self._rows: list[_Row] = []
        self._next = 0

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._rows or self._waiting)

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

    def _decode(self) -> list[Event]:
        tokens = torch.tensor([row.last for row in self._rows], device=self._device)
        self._cache.begin_step()
        hidden = self._model.hidden(tokens, self._cache.lengths - 1, self._cache)
        return self._sample(hidden, 0)

    def _admit(self) -> list[Event]:
        longest = sorted(self._waiting, key=lambda number: -len(self._waiting[number].ids))
        chosen = longest[: self._max_rows - len(self._rows)]
        lengths = [len(self._waiting[number].ids) for number in chosen]
        events = []
        for bucket in length_buckets(lengths, _PREFILL_TOKENS):
            requests = [(chosen[i], self._waiting.pop(chosen[i])) for i in bucket]
            events += self._prefill(requests)
        return events

    def _prefill(self, requests: Sequence[tuple[int, Request]]) -> list[Event]:
        """Compute prompts, each beginning that several have in common once, and draw the first tokens."""
        batch = collate([TokenRow("", request.ids, (True,) * len(request.ids)) for _, request in requests])
        layout = lay_out(batch).to(self._device)
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
        counts = torch.tensor([row.count for row in rows], device=self._device)
        temperatures = torch.tensor([row.request.temperature for row in rows], device=self._device)
        drawn, scores = draw(logits, uniforms(keys, counts), temperatures)
        events = [row.take(*found) for row, *found in zip(rows, drawn.tolist(), scores.tolist(), strict=True)]
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
    """A request that is being decoded."""

    number: int
    request: Request
    count: int = 0
    last: int = 0

    def take(self, token: int, logprob: float) -> Event:
        """The row's next token."""
        self.count, self.last = self.count + 1, token
        finished: Literal["stop", "length"] | None = None
        if token in self.request.stop_ids:
            finished = "stop"
        elif self.count == self.request.max_new_tokens:
            finished = "length"
        return Event(self.number, token, logprob, finished)
