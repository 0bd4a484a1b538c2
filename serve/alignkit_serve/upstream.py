"""What another server sends as an answer, and what its chunks add up to as pieces."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Protocol

from pydantic import BaseModel, Field, ValidationError, model_validator

from alignkit_serve.engine import EngineError, Finish, Likely, Piece, Token

MOST_BYTES = 16 << 20
"""Of one event, or of a body that is no stream."""

_SLIP = 16
"""Bytes of an answer's text that may lie between a token and the next, as where a character was put together of several tokens."""

_LINE_END = re.compile(rb"\r\n|\n|\r(?=[^\n])")  # a carriage return at the very end may be half of a line's end


class Events:
    """The data of server-sent events, wherever the network has cut them. Comments and other fields are left out."""

    def __init__(self) -> None:
        self._begun: list[bytes] = []  # pieces of a line
        self._data: list[bytes] = []  # lines of an event

    def feed(self, received: bytes) -> Iterator[bytes]:
        """What is complete with ``received``. An event that the stream ends in is none."""
        self._begun.append(received)
        if b"\n" in received or b"\r" in received:
            # Not str.splitlines: it takes U+2028 for a line's end, which may stand in the middle of JSON.
            *lines, rest = _LINE_END.split(b"".join(self._begun))
            self._begun = [rest]
            yield from self._events(lines)
        if sum(map(len, self._begun)) + sum(map(len, self._data)) > MOST_BYTES:
            raise EngineError(f"the upstream sent an event of more than {MOST_BYTES >> 20} MiB")

    def _events(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        for line in lines:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
            elif not line and self._data:
                event = b"\n".join(self._data)
                self._data.clear()
                yield event


class Reader(Protocol):
    """What the chunks of one answer add up to."""

    def take(self, choice: Choice, finished: Finish | None) -> Piece:
        """What the answer has grown by with one more chunk."""


class OfText:
    """Of an upstream that is not asked for tokens: each text stands for one."""

    def take(self, choice: Choice, finished: Finish | None) -> Piece:
        """One token, where there is text."""
        text = choice.content()
        tokens = (Token(None, text.encode(), None, None),) if text else ()
        return Piece(text, tokens, tokens, finished)


class OfTokens:
    """Of an upstream that lists the tokens of each chunk with their bytes: vLLM lists all that were drawn, others those with a text.

    Which of them are shown is found by laying their bytes along the text: it may lag behind, where it could be the beginning of a stop
    string, and what such a string or a special token is made of is never in it.
    """

    def __init__(self, url: str, top: int) -> None:
        self._url, self._top = url, top
        self._any = False
        self._text = b""  # what no token has been found for
        self._held: list[Token] = []  # tokens that were not found in the text

    def take(self, choice: Choice, finished: Finish | None) -> Piece:
        """Raises ``EngineError`` where tokens are not told."""
        text, tokens = choice.content(), choice.tokens(self._top)
        self._any = self._any or bool(tokens)
        if (text or choice.token_ids) and not self._any:
            raise EngineError(f"{self._url} gives no log-probabilities; use one that does, or do without them: logprobs false")
        self._text += text.encode()
        self._held += tokens
        return Piece(text, self._shown(finished), tuple(tokens), finished)

    def _shown(self, finished: Finish | None) -> tuple[Token, ...]:
        count = 0
        while self._text and count < len(self._held):
            data = self._held[count].data
            at = self._text.find(data, 0, len(data) + _SLIP)
            if at >= 0:
                self._text = self._text[at + len(data) :]
            elif data.startswith(self._text):
                self._text = b""  # the rest of the token is still to come, or was cut off
            count += 1
        if finished == "length":
            count = len(self._held)
        shown, self._held = self._held[:count], self._held[count:]
        if not self._held:
            self._text = b""  # text never runs ahead of its tokens: this one is of a token that is written otherwise
        return tuple(shown)


class OfAlignkit:
    """Of an alignkit server: each chunk tells all tokens drawn since the last, and the bytes of those that its text shows."""

    def __init__(self, url: str, top: int) -> None:
        self._url, self._top = url, top
        self._held: list[Token] = []  # drawn and not shown, oldest first

    def take(self, choice: Choice, finished: Finish | None) -> Piece:
        """Raises ``EngineError`` where more is shown than was drawn."""
        told, before = choice.tokens(self._top), len(self._held)
        known = self._held + (choice.alignkit.drawn() if choice.alignkit else [])
        if len(told) > len(known):
            raise EngineError(f"{self._url} shows tokens of which it did not tell that they were drawn")
        shown = [replace(token, data=one.data, likeliest=one.likeliest) for token, one in zip(known, told, strict=False)]
        self._held = known[len(told) :]
        return Piece(choice.content(), tuple(shown), tuple([*shown, *self._held][before:]), finished)


class _Alternative(BaseModel):
    token: str
    logprob: float
    octets: list[Annotated[int, Field(ge=0, le=255)]] | None = Field(None, alias="bytes")

    def likely(self) -> Likely:
        return Likely(self.token.encode() if self.octets is None else bytes(self.octets), self.logprob)


class _Listed(_Alternative):
    top_logprobs: list[_Alternative] = []


class _Logprobs(BaseModel):
    """Of a chat (``content``), or in the older form of plain completions, which does not tell bytes."""

    content: list[_Listed] | None = None
    tokens: list[str] = []
    token_logprobs: list[float] = []
    top_logprobs: list[dict[str, float] | None] | None = None

    @model_validator(mode="after")
    def _of_one_length(self) -> _Logprobs:
        if not len(self.tokens) == len(self.token_logprobs) == len(self.top_logprobs or self.tokens):
            raise ValueError("the lists of tokens and of their log-probabilities differ in length")
        return self

    def listed(self) -> list[tuple[Likely, list[Likely]]]:
        """Each token with its alternatives."""
        if self.content is not None:
            return [(one.likely(), [other.likely() for other in one.top_logprobs]) for one in self.content]
        others = self.top_logprobs or [None] * len(self.tokens)
        return [
            (_likely(token, logprob), [_likely(*other) for other in (top or {}).items()])
            for token, logprob, top in zip(self.tokens, self.token_logprobs, others, strict=True)
        ]


class _Both(BaseModel):
    raw: list[float]
    behaviour: list[float | None]


class Drawn(BaseModel):
    """What an alignkit server tells of all new tokens, those of a stop string and the stop token included."""

    token_ids: list[int | None] = []
    logprobs: _Both = _Both(raw=[], behaviour=[])

    @model_validator(mode="after")
    def _of_one_length(self) -> Drawn:
        if not len(self.token_ids) == len(self.logprobs.raw) == len(self.logprobs.behaviour):
            raise ValueError("the lists of token ids and of their log-probabilities differ in length")
        return self

    def drawn(self) -> list[Token]:
        """Tokens whose bytes are not known yet."""
        figures = zip(self.token_ids, self.logprobs.raw, self.logprobs.behaviour, strict=True)
        return [Token(id, b"", raw, behaviour) for id, raw, behaviour in figures]


class _Delta(BaseModel):
    content: str | None = None


class Choice(BaseModel):
    """A chunk of the answer: ``delta`` in a chat, ``text`` in a plain completion. vLLM's ``token_ids`` are those of all new tokens."""

    delta: _Delta = _Delta()
    text: str = ""
    logprobs: _Logprobs | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None
    alignkit: Drawn | None = None

    def content(self) -> str:
        """The new text."""
        return self.delta.content or self.text

    def tokens(self, top: int) -> list[Token]:
        """Those that are listed, with at most ``top`` alternatives. Their ids where there is one for each."""
        listed = self.logprobs.listed() if self.logprobs else []
        ids: Sequence[int | None] = self.token_ids or ()
        if len(ids) != len(listed):
            ids = [None] * len(listed)
        return [Token(id, one.data, one.logprob, None, _likeliest(others, top)) for id, (one, others) in zip(ids, listed, strict=True)]


class _Said(BaseModel):
    message: str


class _Failure(BaseModel):
    """OpenAI's form of an error, that of older vLLM servers (``message``) and FastAPI's own (``detail``)."""

    error: _Said | str | None = None
    message: str | None = None
    detail: str | None = None

    def said(self) -> str:
        """On one line."""
        said = self.error.message if isinstance(self.error, _Said) else self.error or self.message or self.detail or ""
        return _line(said, 1000)


class _Usage(BaseModel):
    prompt_tokens: Annotated[int, Field(ge=0)] | None = None


class Chunk(_Failure):
    """One event of a stream: choices, most often none of them where it tells the usage, or an error."""

    choices: list[Choice] | None = None
    usage: _Usage | None = None


class _OfPolicy(BaseModel):
    context_tokens: int | None = None


class Model(BaseModel):
    """An entry of /v1/models; ``max_model_len`` is vLLM's."""

    id: str
    owned_by: str | None = None
    max_model_len: int | None = None
    alignkit: _OfPolicy | None = None


class Models(BaseModel):
    """What /v1/models answers."""

    data: list[Model]


def _likely(token: str, logprob: float) -> Likely:
    return Likely(token.encode(), logprob)


def _likeliest(others: Sequence[Likely], top: int) -> tuple[Likely, ...]:
    # vLLM puts the drawn token first, whatever its rank.
    return tuple(sorted(others, key=lambda one: -one.logprob)[:top])


def message(body: bytes) -> str:
    """What a server says about its failure, in whatever form, on one line."""
    try:
        said = _Failure.model_validate_json(body).said()
    except ValidationError:
        said = ""
    return said or _line(body.decode(errors="replace"), 200) or "it does not say why"


def _line(text: str, most: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]}..."


def first_problem(error: ValidationError) -> str:
    """The first thing that is wrong and its place, without the value."""
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return ": ".join([*([".".join(map(str, problem["loc"]))] if problem["loc"] else []), problem["msg"]])
