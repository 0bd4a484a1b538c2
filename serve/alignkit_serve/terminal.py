"""A chat in the terminal, on the same API as everyone's. Answers go to the standard output, all that is said about them to the other.

Where the input is no terminal each of its lines is a message, nothing is asked for, and the first problem ends it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from alignkit.api import AlignkitError

HELP = """\
/new          begin a new conversation
/system TEXT  what the model is told before every conversation; without TEXT, nothing
/model NAME   go on with another model; without NAME, which there are
/help         this
/quit         leave (or Ctrl-D, or Ctrl-C where a message is awaited)
Ctrl-C stops an answer. A line that begins with a space is never a command."""

_SECONDS = httpx.Timeout(60.0, connect=10.0)  # The server writes something every few seconds even while it has no token.
_TOLD = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def chat(url: str, key: str | None, model: str | None, system: str | None, temperature: float | None, max_tokens: int | None) -> None:
    """Talk to the server at ``url`` until the input ends. None leaves a choice to the server; it begins with the first of its models.

    Raises ``AlignkitError`` when no conversation can begin, and where nobody types, for whatever goes wrong.
    """
    with _reached(url), _client(url, key) as client:
        talk = _Talk(client, _chosen(_models(client), model), system, temperature, max_tokens)
        lines: Iterable[str]
        if sys.stdin.isatty():
            _say(f"{talk.model} at {client.base_url}; /help says what else there is")
            lines = _typed()
        else:
            lines = _piped()
        for line in lines:
            if line.strip() == "/quit":
                return
            if line.strip():
                _heard(talk, line)


def visible(text: str) -> str:
    """``text`` with its control characters spelled: those of a model must not move a cursor or turn a line around."""
    return _TOLD.sub(lambda match: f"[U+{ord(match[0]):04X}]", text)


def events(pieces: Iterable[bytes]) -> Iterator[str]:
    """The data of each server-sent event, however the network cut the bytes."""
    # By hand: httpx's lines end at U+2028 and its like too, which JSON strings may hold.
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip().decode()


@dataclass(slots=True)
class _Talk:
    """A conversation, with what holds for its next answers."""

    client: httpx.Client
    model: str
    system: str | None
    temperature: float | None
    max_tokens: int | None
    turns: list[dict[str, str]] = field(default_factory=list)

    def answer(self, question: str) -> None:
        """Show the answer as it grows. However it ends, what has come of it is part of the conversation."""
        asked = {"role": "user", "content": question}
        text, about, begun = "", _About(), time.monotonic()
        try:
            with contextlib.closing(self._chunks([*self.turns, asked])) as chunks:
                for chunk in chunks:
                    about.take(chunk)
                    for choice in chunk["choices"]:
                        if piece := choice["delta"].get("content"):
                            text += piece
                            _show(piece)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            about.end = "stopped"
        finally:
            if text:
                _show("\n")
                self.turns += [asked, {"role": "assistant", "content": text}]
        _say(about.line(time.monotonic() - begun))

    def _chunks(self, turns: list[dict[str, str]]) -> Generator[dict[str, Any], None, None]:
        before = [{"role": "system", "content": self.system}] if self.system else []
        body: dict[str, Any] = {"model": self.model, "messages": before + turns, "stream": True, "stream_options": {"include_usage": True}}
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        # As ASCII: half a character, which a terminal may send, has no other form.
        headers = {"Content-Type": "application/json"}
        with self.client.stream("POST", "v1/chat/completions", content=json.dumps(body), headers=headers) as response:
            _granted(response)
            for data in events(response.iter_bytes()):
                if data == "[DONE]":
                    return
                chunk: dict[str, Any] = json.loads(data)
                if "error" in chunk:
                    raise AlignkitError(visible(chunk["error"]["message"]))
                yield chunk
        raise AlignkitError("the connection was lost before the answer was complete")


@dataclass(slots=True)
class _About:
    """What is said under an answer."""

    policy: str | None = None
    tokens: int | None = None
    end: str | None = None

    def take(self, chunk: dict[str, Any]) -> None:
        self.policy = self.policy or chunk.get("alignkit", {}).get("policy_version")
        if usage := chunk.get("usage"):
            self.tokens = usage["completion_tokens"]
        if any(choice["finish_reason"] == "length" for choice in chunk["choices"]):
            self.end = "cut off at the token limit"

    def line(self, seconds: float) -> str:
        policy = f"policy {self.policy}" if self.policy else None
        tokens = None if self.tokens is None else f"{self.tokens} {'token' if self.tokens == 1 else 'tokens'}"
        return " · ".join(part for part in (policy, tokens, f"{seconds:.1f} s", self.end) if part)


def _heard(talk: _Talk, line: str) -> None:
    """Do what one line asks for. A person can go on after a problem; whoever wrote a file of lines cannot."""
    try:
        with _reached(str(talk.client.base_url).rstrip("/")):
            if line.startswith("/"):
                _command(talk, *line.strip().partition(" ")[::2])
            else:
                talk.answer(line.strip())
    except AlignkitError as problem:
        if not sys.stdin.isatty():
            raise
        print(f"error: {problem}", file=sys.stderr, flush=True)


def _command(talk: _Talk, name: str, rest: str) -> None:
    rest = rest.strip()
    match name:
        case "/new":
            talk.turns.clear()
            _say("a new conversation")
        case "/system":
            talk.system = rest or None
            _say("the model is told this first from now on" if rest else "the model is told nothing first from now on")
        case "/model" if rest:
            talk.model = _chosen(_models(talk.client), rest)
            _say(f"{talk.model} answers from now on")
        case "/model":
            _say("\n".join(f"{'*' if name == talk.model else ' '} {name}" for name in _models(talk.client)))
        case "/help":
            _say(HELP)
        case _:
            raise AlignkitError(f"{visible(name)} is no command; /help lists them")


def _models(client: httpx.Client) -> list[str]:
    with client.stream("GET", "v1/models") as response:
        _granted(response)
        try:
            return [model["id"] for model in json.loads(response.read())["data"]]
        except (ValueError, KeyError, TypeError):
            raise _stranger(response) from None


def _chosen(models: list[str], wanted: str | None) -> str:
    if not models:
        raise AlignkitError("the server has no model; put one in its place with: alignkit promote")
    if wanted is not None and wanted not in models:
        raise AlignkitError(f"there is no model {wanted!r}; there are: {visible(', '.join(models))}")
    return wanted or models[0]


def _client(url: str, key: str | None) -> httpx.Client:
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise AlignkitError("the key has characters that no key has; is ALIGNKIT_API_KEY what `alignkit keys create` printed?")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=url.rstrip("/").removesuffix("/v1"), headers=headers, timeout=_SECONDS)


@contextmanager
def _reached(url: str) -> Iterator[None]:
    """Within, what a network does becomes an ``AlignkitError``."""
    try:
        yield
    except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise AlignkitError(f"{url!r} is no address of a server; it should look like http://127.0.0.1:8000") from error
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise AlignkitError(f"no server answers at {url} ({error}); start one with: alignkit serve RUN") from error
    except httpx.TimeoutException as error:
        raise AlignkitError(f"nothing came from {url} for {_SECONDS.read:g} s; see what its log says, and ask again") from error
    except httpx.TransportError as error:
        raise AlignkitError(f"the connection to {url} was lost ({error}); ask again") from error


def _granted(response: httpx.Response) -> None:
    """Raise ``AlignkitError`` in the server's words unless it answers what it was asked."""
    if response.is_success:
        return
    try:
        message = visible(json.loads(response.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        raise _stranger(response) from None
    if response.status_code == 401:
        message += "; make a key with: alignkit keys create --scopes infer, and set ALIGNKIT_API_KEY to it"
    if seconds := response.headers.get("retry-after"):
        message += f"; try again in {visible(seconds)} s"
    raise AlignkitError(message)


def _stranger(response: httpx.Response) -> AlignkitError:
    return AlignkitError(f"{response.url} answered {response.status_code} in another form than alignkit's; is there an alignkit server?")


def _typed() -> Iterator[str]:
    """Lines that a person types, until Ctrl-D or Ctrl-C."""
    with contextlib.suppress(ImportError):  # Windows has none, and edits lines all the same.
        importlib.import_module("readline")  # what input() then edits lines with
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return


def _piped() -> Iterator[str]:
    try:
        yield from (line.removesuffix("\n") for line in sys.stdin)
    except UnicodeDecodeError as error:
        raise AlignkitError(f"the input is not {error.encoding} text: {error.reason}") from error


def _show(text: str) -> None:
    encoding = sys.stdout.encoding
    print(visible(text).encode(encoding, "replace").decode(encoding), end="", flush=True)


def _say(text: str) -> None:
    quiet = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
    print(f"{quiet[0]}{visible(text)}{quiet[1]}", file=sys.stderr, flush=True)
