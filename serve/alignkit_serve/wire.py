"""Answers in OpenAI's JSON, whole and as a stream of chunks; each has every key that the specification requires, null where empty."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import alignkit
from alignkit_serve.answers import Choice
from alignkit_serve.engine import Piece, Token
from alignkit_serve.schemas import Extras

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace") + b"\n\n"


@dataclass(slots=True)
class Form:
    """How the answers of one request are written. ``blind``: nothing tells which policy gave which answer."""

    id: str
    created: int
    model: str
    chat: bool
    top_logprobs: int | None
    wants_usage: bool
    extras: Extras
    policy: str | None
    fingerprint: str
    about: dict[str, Any] = field(default_factory=dict)
    _begun: set[int] = field(default_factory=set)
    _characters: dict[int, int] = field(default_factory=dict)

    def chunks(self, choice: Choice, piece: Piece) -> list[bytes]:
        """The events of one piece: the first of a choice says whose turn it is, the last why it ended."""
        events = []
        first = choice.index not in self._begun
        self._begun.add(choice.index)
        if first and self.chat:
            events.append(self._chunk(choice, {"role": "assistant", "content": ""}, None, None, self._named(choice)))
        drawn = self._drawn(piece.drawn)
        if piece.text or piece.shown or drawn:
            delta: Any = {"content": piece.text} if self.chat else piece.text
            about = drawn if self.chat else {**(self._named(choice) if first else {}), **drawn}
            events.append(self._chunk(choice, delta, self._logprobs(choice, piece.shown), None, about))
        if piece.finished:
            events.append(self._chunk(choice, {} if self.chat else "", None, piece.finished, {}))
        return events

    def usage_chunk(self, choices: Sequence[Choice]) -> bytes:
        """The one that follows all choices."""
        return event({**self._head(chunk=True), "choices": [], "usage": usage(choices)})

    def body(self, choices: Sequence[Choice], shown: dict[int, list[Token]]) -> dict[str, Any]:
        """The whole answer. ``shown``: the tokens of each choice's text."""
        return {
            **self._head(chunk=False),
            "choices": [self._whole(choice, shown[choice.index]) for choice in choices if choice.shown],
            "usage": usage(choices),
        }

    def _head(self, *, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        about = {"inference_id": self.id, **({"policy_version": self.policy} if self.policy else {}), **self.about}
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "alignkit": about,
        }

    def _chunk(self, choice: Choice, delta: Any, logprobs: Any, finish: str | None, about: dict[str, Any]) -> bytes:
        text = {"delta": delta} if self.chat else {"text": delta}
        one = {"index": choice.index, **text, "logprobs": logprobs, "finish_reason": finish, **({"alignkit": about} if about else {})}
        return event({**self._head(chunk=True), "choices": [one], **({"usage": None} if self.wants_usage else {})})

    def _whole(self, choice: Choice, shown: Sequence[Token]) -> dict[str, Any]:
        text = "".join(choice.text)
        content = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        about = {**self._named(choice), **self._drawn(choice.drawn)}
        return {
            "index": choice.index,
            **content,
            "logprobs": self._logprobs(choice, shown),
            "finish_reason": choice.finished,
            "alignkit": about,
        }

    def _named(self, choice: Choice) -> dict[str, Any]:
        return {"completion_id": choice.id, "inference_id": choice.inference_id}

    def _drawn(self, drawn: Sequence[Token]) -> dict[str, Any]:
        """All tokens drawn, those of a stop string and the stop token included, for those who train on them."""
        about: dict[str, Any] = {}
        if self.extras.return_token_ids and drawn:
            about["token_ids"] = [token.id for token in drawn]
        if (which := self.extras.return_logprobs) and drawn:
            about["logprobs"] = {
                **({"raw": [token.raw for token in drawn]} if which in ("raw", "both") else {}),
                **({"behaviour": [token.behaviour for token in drawn]} if which in ("behaviour", "both") else {}),
            }
        return about

    def _logprobs(self, choice: Choice, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.top_logprobs is None:
            return None
        if self.chat:
            return {"content": [_content(token, self.top_logprobs) for token in tokens], "refusal": None}
        offsets, at = [], self._characters.get(choice.index, 0)
        for token in tokens:
            offsets.append(at)
            at += len(_shown(token.data))
        self._characters[choice.index] = at
        return {
            "tokens": [_shown(token.data) for token in tokens],
            "token_logprobs": [token.raw for token in tokens],
            "top_logprobs": [{_shown(one.data): one.logprob for one in token.likeliest[: self.top_logprobs]} for token in tokens],
            "text_offset": offsets,
        }


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """Tokens of the prompts, each counted once, and all that were drawn for choices that are shown."""
    prompts = {choice.inference_id: choice.prompt.tokens or 0 for choice in choices}
    completion = sum(len(choice.drawn) for choice in choices if choice.shown)
    prompt = sum(prompts.values())
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def fingerprint(version: str) -> str:
    """Changes when answers to the same seed may change: with the policy, and with what computes."""
    return f"fp_{version}_{alignkit.__version__}"


def _content(token: Token, top: int) -> dict[str, Any]:
    assert token.raw is not None  # whoever asks an engine for what it has not got was refused
    return {**_one(token.data, token.raw), "top_logprobs": [_one(likely.data, likely.logprob) for likely in token.likeliest[:top]]}


def _one(data: bytes, logprob: float) -> dict[str, Any]:
    # JSON has no infinity; the API writes -9999 for a token that could not have been drawn.
    return {"token": _shown(data), "bytes": list(data), "logprob": max(logprob, -9999.0)}


def _shown(data: bytes) -> str:
    return data.decode(errors="replace")
