"""Token by token: rows join at any step, carry their own sampling parameters, and leave when they are done.

``add`` a request, ``step`` until ``busy`` is False; a rollout adds all its requests first, a server adds them as they come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from alignkit.data.collate import collate, length_buckets
from alignkit.models.attention import lay_apart, lay_out
from alignkit.models.decoding import Decoding
from alignkit.models.transfer import listed, send
from alignkit.rollout.cache import Cache
from alignkit.rollout.filters import NONE, Filters, filtered
from alignkit.rollout.launch import launch_on
from alignkit.rollout.noise import draw, uniforms
from alignkit.types import TokenRow

PREFILL_TOKENS = {"cpu": 8192, "cuda": 32768}
"""Prompt tokens of one step, by device: enough to keep it busy, and what bounds a prefill's memory."""


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

    A GPU works on the next tokens while the last ones are read: a row whose stop token has not been read yet gets one more, which
    is thrown away.
    """

    def __init__(self, model: Decoding, *, max_rows: int, prefill_tokens: int | None = None, together: bool = True) -> None:
        self._model = model
        self._max_rows = max_rows
        self._prefill_tokens = prefill_tokens or PREFILL_TOKENS[model.device.type]
        self._together = together
        self._device = model.device
        self._launch = launch_on(model)
        self._cache = Cache(model.layers, model.device, max_rows)
        self._state = _State(model.device, max_rows)
        self._waiting: dict[int, Request] = {}
        self._rows: list[_Row] = []
        self._drawn: deque[_Draw] = deque()
        self._next = 0

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._rows or self._waiting or self._drawn)

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
        for row in (*self._rows, *(row for one in self._drawn for row in one.rows)):
            row.gone |= row.number == number
        self._remove([row for row in self._rows if row.gone])

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One token for every row being decoded, and the first one for the requests that now find room; a GPU's come a step later."""
        if not self._rows and not self._waiting:
            return self._read(0)
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
        self._cache.grow()
        count = min(self._launch.rows(len(self._rows)), self._cache.rows, self._max_rows)
        plain = all(row.request.plain for row in self._rows)
        logits = self._launch(self._cache.place, (count, plain), partial(self._forward, count, plain))
        return self._sample(logits, 0, drawn=plain)

    def _forward(self, count: int, plain: bool) -> Tensor:
        """The logits of the first so many rows' next tokens; where nothing is done to them, these are drawn. Nothing waits for the host."""
        self._cache.begin_step(count)
        hidden = self._model.hidden(self._state.tokens[:count], self._cache.lengths[:count] - 1, self._cache)
        logits = self._model.logits(hidden)
        if plain:
            self._state.draw(logits, 0)
        return logits

    def _admit(self) -> list[Event]:
        chosen = list(self._next_in_line())
        lengths = [len(self._waiting[number].ids) for number in chosen]
        events = []
        for bucket in length_buckets(lengths, self._prefill_tokens):
            events += self._prefill([_Row(chosen[i], self._waiting.pop(chosen[i])) for i in bucket])
        return events

    def _next_in_line(self) -> Iterator[int]:
        """Who comes in now: as many as find room, and whose prompts are computed in one step; one prompt always is."""
        room, tokens = self._max_rows - len(self._rows), self._prefill_tokens
        for number, request in self._waiting.items():
            if room == 0 or tokens <= 0:
                return
            yield number
            room, tokens = room - 1, tokens - len(request.ids)

    def _prefill(self, rows: Sequence[_Row]) -> list[Event]:
        """Compute prompts, and draw the first tokens."""
        batch = collate([TokenRow("", row.request.ids, (True,) * len(row.request.ids)) for row in rows])
        layout = lay_out(batch).to(self._device) if self._together else lay_apart(batch, self._device)
        lengths = [len(row.request.ids) for row in rows]
        attention = self._cache.prefill(layout, lengths, max(row.request.max_new_tokens for row in rows))
        hidden = self._model.hidden(send(batch.ids, self._device).flatten()[layout.tokens], layout.positions, attention)
        ends = layout.line.gather(1, listed(lengths, self._device)[:, None] - 1).squeeze(1)
        start = len(self._rows)
        self._rows += rows
        self._state.join(start, rows)
        return self._sample(self._model.logits(hidden[ends]), start)

    def _sample(self, logits: Tensor, start: int, *, drawn: bool = False) -> list[Event]:
        """Draw the next token of row ``start`` and those below it, unless that is done, and let rows go that have all they may have."""
        rows = self._rows[start:]
        logits = logits[: len(rows)]
        if not drawn:
            self._state.draw(_filtered(logits, rows), start)
        for row in rows:
            row.drawn += 1
        self._drawn.append(_Draw(rows, self._state, start, logits))
        self._remove([row for row in rows if row.drawn == row.request.max_new_tokens])
        # What is filtered may depend on every token before it.
        return self._read(self._launch.ahead if all(row.request.plain for row in self._rows) else 0)

    def _read(self, ahead: int) -> list[Event]:
        """What was drawn, but for the last ``ahead`` draws; rows go that have come to a stop token."""
        events = []
        while len(self._drawn) > ahead:
            events += self._drawn.popleft().read()
        self._remove([row for row in self._rows if row.gone])
        return events

    def _remove(self, gone: Sequence[_Row]) -> None:
        """Rows leave, and the last ones take their places."""
        if not gone:
            return
        numbers = {row.number for row in gone}
        left = len(self._rows) - len(gone)
        to = [i for i, row in enumerate(self._rows[:left]) if row.number in numbers]
        origin = [i for i, row in enumerate(self._rows) if i >= left and row.number not in numbers]
        self._cache.move(to, origin, left)
        self._state.move(to, origin)
        for i, j in zip(to, origin, strict=True):
            self._rows[i] = self._rows[j]
        del self._rows[left:]


@dataclass(slots=True)
class _Row:
    """A request that is being decoded, and its response so far. ``drawn``: how many tokens, those included that were not read yet.
    ``gone``: what is still on its way is not wanted.
    """

    number: int
    request: Request
    drawn: int = 0
    gone: bool = False
    tokens: list[int] = field(default_factory=list)

    def take(self, token: int, logprob: float) -> Event:
        """The row's next token."""
        self.tokens.append(token)
        finished: Literal["stop", "length"] | None = None
        if token in self.request.stop_ids:
            finished = "stop"
        elif len(self.tokens) == self.request.max_new_tokens:
            finished = "length"
        self.gone = finished is not None
        return Event(self.number, token, logprob, finished)


class _State:
    """What the device knows of each row [max_rows]: its last token, that one's log-probability, its noise and how much of it was used."""

    def __init__(self, device: torch.device, max_rows: int) -> None:
        self.tokens = torch.zeros(max_rows, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(max_rows, device=device)
        self._keys, self._counts = torch.zeros_like(self.tokens), torch.zeros_like(self.tokens)
        self._temperatures = torch.ones_like(self.logprobs)

    def join(self, start: int, rows: Sequence[_Row]) -> None:
        """Row ``start`` and those below it come in."""
        place, device = slice(start, start + len(rows)), self.tokens.device
        self._keys[place] = listed([row.request.noise_key for row in rows], device)
        self._counts[place] = 0
        # What is filtered has been divided by its temperature.
        self._temperatures[place] = listed([row.request.temperature if row.request.plain else 1.0 for row in rows], device)

    def draw(self, logits: Tensor, start: int) -> None:
        """The next token of row ``start`` and those below it, of ``logits`` [n v]."""
        place = slice(start, start + len(logits))
        noise = uniforms(self._keys[place], self._counts[place])
        self.tokens[place], self.logprobs[place] = draw(logits, noise, self._temperatures[place])
        self._counts[place] += 1

    def move(self, to: Sequence[int], origin: Sequence[int]) -> None:
        """Rows ``origin`` take the places ``to``."""
        if to:
            there, here = listed(to, self.tokens.device), listed(origin, self.tokens.device)
            for kept in (self.tokens, self.logprobs, self._keys, self._counts, self._temperatures):
                kept[there] = kept[here]


class _Draw:
    """Tokens on their way from the device."""

    def __init__(self, rows: Sequence[_Row], state: _State, start: int, logits: Tensor) -> None:
        self.rows = rows
        place = slice(start, start + len(rows))
        found = [state.tokens[place], state.logprobs[place]]
        self._reported = [i for i, row in enumerate(rows) if row.request.report is not None]
        if self._reported:
            places = listed(self._reported, logits.device)
            own = logits[places].float().log_softmax(dim=-1)
            best = own.topk(max(rows[i].request.report or 0 for i in self._reported))
            found += [own.gather(1, state.tokens[place][places, None]).squeeze(1), best.values, best.indices]
        self._found = [x.to("cpu", non_blocking=True, copy=True) for x in found]
        self._arrived = None
        if logits.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[Event]:
        """Wait for the tokens, and give them to their rows."""
        if self._arrived:
            self._arrived.synchronize()
        tokens, logprobs, *reports = (x.tolist() for x in self._found)
        report = dict(zip(self._reported, zip(*reports, strict=True), strict=True))
        events = []
        for i, (row, token, logprob) in enumerate(zip(self.rows, tokens, logprobs, strict=True)):
            if row.gone:
                continue
            event = row.take(token, logprob)
            if i in report:
                raw, values, likeliest = report[i]
                count = row.request.report
                event = replace(event, raw=raw, likeliest=tuple(zip(likeliest[:count], values[:count], strict=True)))
            events.append(event)
        return events


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
