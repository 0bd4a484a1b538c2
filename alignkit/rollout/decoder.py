"""Token by token: rows join at any step, carry their own sampling parameters, and leave when they are done.

``add`` a request, ``step`` until ``busy`` is False; a rollout adds all its requests first, a server adds them as they come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from alignkit.rollout.cache import join, new_cache, select
from alignkit.rollout.noise import draw, uniforms

# Below this share of live rows the block is rewritten without the finished ones: a copy of a few milliseconds, saved at each later step.
_COMPACT_BELOW = 0.85


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
    """Decodes with a transformers causal language model whose attention uses the whole past.

    At most ``max_rows`` requests are decoded at once; the others wait, longest prompt first, so that a prefill pads little.
    """

    def __init__(self, model: Any, *, max_rows: int) -> None:
        self._model = model
        self._max_rows = max_rows
        self._device = next(model.parameters()).device
        self._cache = new_cache(model.config.num_hidden_layers)
        self._waiting: dict[int, Request] = {}
        self._rows: list[int | None] = []  # request of each row of the cache; None: finished, not yet compacted
        self._requests: dict[int, Request] = {}
        self._next = 0
        self._columns = torch.empty(0, dtype=torch.bool, device=self._device).reshape(0, 0)  # [rows columns]: True at real tokens
        self._tokens = torch.empty(0, dtype=torch.long, device=self._device)  # [rows]: the token to feed
        self._counts: list[int] = []

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._requests)

    def add(self, request: Request) -> int:
        """Queue a request; its number names it in events."""
        number, self._next = self._next, self._next + 1
        self._requests[number] = self._waiting[number] = request
        return number

    def cancel(self, number: int) -> None:
        """Forget a request; a finished or unknown one is ignored."""
        self._requests.pop(number, None)
        self._waiting.pop(number, None)
        self._rows = [None if row == number else row for row in self._rows]

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One token for every row being decoded, and the first one for the requests that now find room."""
        self._compact()
        events = self._decode() if self._rows else []
        return events + self._admit()

    def _decode(self) -> list[Event]:
        if all(row is None for row in self._rows):
            return []
        positions = self._columns.sum(dim=1, keepdim=True)
        self._columns = torch.cat([self._columns, self._columns.new_ones(len(self._rows), 1)], dim=1)
        logits = self._forward(self._tokens[:, None], self._columns, positions, self._cache)
        return self._sample(logits, range(len(self._rows)))

    def _admit(self) -> list[Event]:
        room = self._max_rows - sum(row is not None for row in self._rows)
        chosen = sorted(self._waiting, key=lambda number: -len(self._waiting[number].ids))[:room]
        if not chosen:
            return []
        prompts = [self._waiting.pop(number).ids for number in chosen]
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros(len(prompts), width, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = True
        mask = mask.to(self._device)
        cache = new_cache(self._model.config.num_hidden_layers)
        logits = self._forward(ids.to(self._device), mask, (mask.cumsum(1) - 1).clamp(min=0), cache)
        self._append(chosen, cache, mask)
        return self._sample(logits, range(len(self._rows) - len(chosen), len(self._rows)))

    def _append(self, numbers: Sequence[int], cache: Any, mask: Tensor) -> None:
        """Put prefilled rows below the ones that are being decoded."""
        if self._rows:
            join(self._cache, cache)
            width = max(self._columns.shape[1], mask.shape[1])
            wide = [torch.nn.functional.pad(m, (width - m.shape[1], 0)) for m in (self._columns, mask)]
            self._columns = torch.cat(wide)
        else:
            self._cache, self._columns = cache, mask
        self._rows += numbers
        self._counts += [0] * len(numbers)
        self._tokens = torch.cat([self._tokens, self._tokens.new_zeros(len(numbers))])

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Logits [rows v] of the next token."""
        out = self._model(
            input_ids=ids, attention_mask=mask.long(), position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def _sample(self, logits: Tensor, rows: range) -> list[Event]:
        """Draw the next token of ``rows`` (logits [rows v] in their order), and let finished rows go."""
        live = [(i, row) for i, row in enumerate(rows) if self._rows[row] is not None]
        requests = [self._requests[number] for _, row in live if (number := self._rows[row]) is not None]
        keys = torch.tensor([r.noise_key for r in requests], device=self._device)
        counts = torch.tensor([self._counts[row] for _, row in live], device=self._device)
        temperatures = torch.tensor([r.temperature for r in requests], device=self._device)
        if len(live) < len(rows):
            logits = logits[[i for i, _ in live]]
        drawn, scores = draw(logits, uniforms(keys, counts), temperatures)
        self._tokens[[row for _, row in live]] = drawn
        events = []
        for (_, row), request, token, logprob in zip(live, requests, drawn.tolist(), scores.tolist(), strict=True):
            self._counts[row] += 1
            number = self._rows[row]
            assert number is not None
            finished: Literal["stop", "length"] | None = None
            if token in request.stop_ids:
                finished = "stop"
            elif self._counts[row] == request.max_new_tokens:
                finished = "length"
            events.append(Event(number, token, logprob, finished))
            if finished:
                self.cancel(number)
        return events

    def _compact(self) -> None:
        """Drop finished rows, and the columns that only they used."""
        live = [row for row, number in enumerate(self._rows) if number is not None]
        if not self._rows or len(live) > _COMPACT_BELOW * len(self._rows):
            return
        if not live:
            self._rows, self._counts = [], []
            self._tokens = self._tokens[:0]
            return
        kept = torch.tensor(live, device=self._device)
        columns = self._columns[kept]
        first = int(columns.any(dim=0).int().argmax())
        self._columns = columns[:, first:]
        select(self._cache, kept, first)
        self._tokens = self._tokens[kept]
        self._rows = [self._rows[row] for row in live]
        self._counts = [self._counts[row] for row in live]
