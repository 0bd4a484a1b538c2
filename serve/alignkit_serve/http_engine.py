"""The engine of another server: each answer is a streamed request of its own to one that speaks OpenAI's API."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import httpx
from pydantic import ValidationError

from alignkit.api import Prompt
from alignkit.rollout.noise import noise_key
from alignkit_serve.engine import Capabilities, Encoded, EngineError, Finish, Parameters, Piece, PromptError
from alignkit_serve.upstream import (
    MOST_BYTES,
    Chunk,
    Events,
    Model,
    Models,
    OfAlignkit,
    OfText,
    OfTokens,
    Reader,
    first_problem,
    message,
)

_ATTEMPTS = 4
"""How often an upstream that is busy is asked before it is believed."""

_LONGEST_WAIT_SECONDS = 20.0
"""A ``Retry-After`` beyond this is for the client to wait out."""

_GOODBYE_SECONDS = 2.0
"""How long the end of a stream is waited for once the answer is complete."""

_TOP_LOGPROBS = 20

_FINISHES: Mapping[str, Finish] = {"stop": "stop", "length": "length"}


class HttpEngine:
    """Answers with ``model`` of the server at ``url``, which the operator names and never a request.

    ``policy_version`` keeps apart what the upstream's prefix cache holds of one policy and of the next. ``timeout`` is the longest
    silence, in seconds, after which the upstream counts as hung. An upstream that gives no log-probabilities is refused, unless
    ``logprobs`` is False: then none are asked for, and each piece of text counts as one token.

    vLLM puts the filters that a model's makers recommend in place of those that a request does not name (top_k, min_p,
    repetition_penalty); ``--generation-config vllm`` keeps it from that.
    """

    name = "openai-http"

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        policy_version: str = "",
        logprobs: bool = True,
        timeout: float = 60.0,
    ) -> None:
        self._url, host = _base(url)
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise EngineError(f"the API key for {self._url} holds a line break or another character that no header can hold")
        self._model, self._policy_version, self._logprobs, self._timeout = model, policy_version, logprobs, timeout
        self._keyed = api_key is not None
        self._client = httpx.AsyncClient(
            headers={"Accept-Encoding": "identity", **({"Authorization": f"Bearer {api_key}"} if api_key is not None else {})},
            timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)),
            # How many answers grow at once is not decided here. A connection is given up well before servers do (5 s and more):
            # one that closes just as it is used again would cost an answer.
            limits=httpx.Limits(max_connections=None, keepalive_expiry=2.0),
            trust_env=not _loopback(host),
        )
        self._told: Model | None = None
        self._waiting = self._growing = self._drawn = 0

    async def started(self) -> HttpEngine:
        """Ask the upstream once whether it has the model, and what it tells of it. Raises ``EngineError`` when it has not."""
        try:
            async with self._answering("GET", "/models", None) as response:
                found = Models.model_validate_json(await _body(response)).data
        except httpx.RequestError as error:
            raise self._unreachable(error) from error
        except ValidationError as error:
            problem = f"{self._url}/models answers with no list of models ({first_problem(error)})"
            raise EngineError(f"{problem}; is it an OpenAI-compatible server?") from error
        named = {model.id: model for model in found}
        if self._model not in named:
            raise EngineError(f"{self._url} has no model {self._model!r}; it has: {', '.join(sorted(named)) or 'none'}")
        self._told = named[self._model]
        return self

    def capabilities(self) -> Capabilities:
        """As far as the upstream has told. A filter that it does not know it refuses itself."""
        told = self._told or Model(id=self._model)
        return Capabilities(
            context_tokens=told.alignkit.context_tokens if told.alignkit else told.max_model_len,
            top_logprobs=_TOP_LOGPROBS if self._logprobs else -1,
            behaviour_logprobs=self._logprobs and told.alignkit is not None,
            token_ids=self._logprobs and (told.alignkit is not None or told.owned_by == "vllm"),
            top_k=True,
            batch_invariant=False,
        )

    def encode(self, prompt: Prompt) -> Encoded:
        """The prompt as it is; the upstream makes tokens of it."""
        return Encoded(prompt, (), None)

    async def generate(self, prompt: Encoded, parameters: Parameters) -> AsyncGenerator[Piece]:
        """One answer. Closing the iterator closes the upstream's stream, which cancels there."""
        reader = self._reader(parameters)
        path, body = self._request(prompt.prompt, parameters)
        growing = False
        self._waiting += 1
        try:
            async with self._answering("POST", path, body) as response, contextlib.aclosing(self._chunks(response)) as chunks:
                async for chunk in chunks:
                    for choice in chunk.choices or ():
                        piece = reader.take(choice, self._finish(choice.finish_reason))
                        if piece.drawn and not growing:
                            growing = True
                            self._waiting, self._growing = self._waiting - 1, self._growing + 1
                        self._drawn += len(piece.drawn)
                        if piece.finished:
                            yield replace(piece, prompt_tokens=await _prompt_tokens(chunk, chunks))
                            return
                        if piece.text or piece.drawn:
                            yield piece
            raise EngineError(f"{self._url} ended an answer in the middle: its stream closed without a finish_reason")
        except httpx.RequestError as error:
            raise self._unreachable(error) from error
        finally:
            if growing:
                self._growing -= 1
            else:
                self._waiting -= 1

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    def problem(self) -> str | None:
        """None: an upstream that is gone may be back at the next request."""
        return None

    def figures(self) -> Mapping[str, float]:
        """``waiting``: answers asked for of which no token has come."""
        return {"rows": self._growing, "waiting": self._waiting, "tokens": self._drawn}

    def _reader(self, parameters: Parameters) -> Reader:
        if not self._logprobs:
            return OfText()
        if self._told and self._told.alignkit:
            return OfAlignkit(self._url, parameters.top_logprobs)
        return OfTokens(self._url, parameters.top_logprobs)

    def _request(self, prompt: Prompt, parameters: Parameters) -> tuple[str, dict[str, Any]]:
        """Where to, and what."""
        seed, choice = parameters.noise
        body: dict[str, Any] = {
            "model": self._model,
            "n": 1,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": parameters.max_tokens,  # null rather than nothing: vLLM ends a continuation after 16 tokens unless told
            "temperature": parameters.temperature,
            "top_p": parameters.top_p,
            "presence_penalty": parameters.presence_penalty,
            "frequency_penalty": parameters.frequency_penalty,
            "seed": noise_key(seed, 0, "", choice) & 0x7FFFFFFF,
        }
        if parameters.top_k:
            body["top_k"] = parameters.top_k
        if parameters.stop:
            body["stop"] = list(parameters.stop)
        if parameters.logit_bias:
            body["logit_bias"] = {str(token): bias for token, bias in parameters.logit_bias}
        if self._policy_version:
            body["cache_salt"] = self._policy_version
        if self._logprobs:
            likeliest = max(1, parameters.top_logprobs)  # llama.cpp takes 0 for no log-probabilities at all
            body |= {"logprobs": likeliest} if prompt.plain else {"logprobs": True, "top_logprobs": likeliest}
            body["return_token_ids"] = True
            if self._told and self._told.alignkit:
                body["alignkit"] = {"return_token_ids": True, "return_logprobs": "both"}
        if prompt.plain:
            return "/completions", {**body, "prompt": prompt.messages[0].content}
        return "/chat/completions", {**body, "messages": [{"role": turn.role, "content": turn.content} for turn in prompt.messages]}

    @contextlib.asynccontextmanager
    async def _answering(self, method: str, path: str, body: Any) -> AsyncIterator[httpx.Response]:
        """A good response whose body is still to be read. Raises ``PromptError``, ``EngineError`` and what httpx raises."""
        for attempt in range(1, _ATTEMPTS + 1):
            async with self._client.stream(method, self._url + path, json=body) as response:
                if response.is_success:
                    yield response
                    return
                wait = _retry_after(response)
                if wait is None or attempt == _ATTEMPTS:
                    raise self._refusal(response, message(await _body(response)), attempt)
            await asyncio.sleep(wait)

    def _refusal(self, response: httpx.Response, said: str, attempts: int) -> EngineError | PromptError:
        status = response.status_code
        if response.is_redirect:
            to = response.headers.get("Location", "")[:200]
            return EngineError(f"{self._url} redirects to {to!r}, and redirects are not followed; name the address itself")
        if status in (400, 413, 422) and response.request.method == "POST":
            return PromptError(said)
        if status in (401, 403):
            # What it says may quote the key.
            return EngineError(f"{self._url} {'refuses the API key' if self._keyed else 'asks for an API key'} (status {status})")
        if status == 404:
            return EngineError(f"{self._url} has no model {self._model!r}, or is not the address of such an API (status 404): {said}")
        if status in (429, 503):
            return EngineError(f"{self._url} is busy (status {status}, asked {attempts} times): {said}")
        return EngineError(f"{self._url} failed with status {status}: {said}")

    def _unreachable(self, error: httpx.RequestError) -> EngineError:
        said = str(error) or type(error).__name__
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return EngineError(f"nothing answers at {self._url} ({said}); is the server there running?")
        if isinstance(error, httpx.TimeoutException):
            return EngineError(f"{self._url} has been silent for {self._timeout:g} s")
        return EngineError(f"the connection to {self._url} broke: {said}")

    async def _chunks(self, response: httpx.Response) -> AsyncGenerator[Chunk]:
        """The chunks of an answer. Raises ``EngineError`` where something else is sent, and what httpx raises."""
        kind = response.headers.get("Content-Type", "nothing").partition(";")[0].strip()
        if kind != "text/event-stream":
            raise EngineError(f"{self._url} answers with {kind[:100]} instead of text/event-stream; is it an OpenAI-compatible server?")
        events = Events()
        async for received in response.aiter_bytes():
            for event in events.feed(received):
                if event.strip() != b"[DONE]":
                    yield self._chunk(event)

    def _chunk(self, event: bytes) -> Chunk:
        try:
            chunk = Chunk.model_validate_json(event)
        except ValidationError as error:
            # Where and what is wrong, but not the text: it may be somebody's.
            raise EngineError(f"{self._url} sent something that is not a chunk of an answer: {first_problem(error)}") from error
        if chunk.choices is None or chunk.error is not None:
            raise EngineError(f"{self._url} gave up an answer: {chunk.said() or 'it sent an event without choices'}")
        return chunk

    def _finish(self, reason: str | None) -> Finish | None:
        if reason and reason not in _FINISHES:
            raise EngineError(f"{self._url} ended an answer with the finish_reason {reason[:100]!r}; understood: {', '.join(_FINISHES)}")
        return _FINISHES[reason] if reason else None


def _base(url: str) -> tuple[str, str]:
    """The address below which the API's paths are, and its host. /v1 may be left out."""
    try:
        parsed = httpx.URL(url.rstrip("/"))
    except httpx.InvalidURL as error:
        raise EngineError(f"{url!r} is no address ({error}); one looks like http://127.0.0.1:8000/v1") from error
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise EngineError(f"the address at {parsed.host} holds more than host, port and path; a key belongs into api_key")
    if parsed.scheme not in ("http", "https") or not parsed.host or not 0 < (parsed.port or 80) < 1 << 16:
        raise EngineError(f"{url!r} is no address of a server; one looks like http://127.0.0.1:8000/v1")
    base = str(parsed)
    return base if base.endswith("/v1") else f"{base}/v1", parsed.host


def _loopback(host: str) -> bool:
    """Whether the server is on this machine, where no proxy can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds after which a busy server wants to be asked again; None where it does not say, or says more than can be waited."""
    if response.status_code not in (429, 503):
        return None
    try:
        seconds = float(response.headers.get("Retry-After", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds <= _LONGEST_WAIT_SECONDS else None


async def _body(response: httpx.Response) -> bytes:
    """All of it, or as much as anyone could want to read."""
    body = b""
    async for data in response.aiter_bytes():
        body += data
        if len(body) > MOST_BYTES:
            break
    return body


async def _prompt_tokens(last: Chunk, rest: AsyncIterator[Chunk]) -> int | None:
    """How many tokens the prompt had, if that is told with the ``last`` chunk of an answer or after it.

    The end of the stream is waited for: a server may take a client that leaves after the last token for one that does not want the
    answer. The answer is complete, so nothing can go wrong with it any more.
    """
    usage = last.usage
    with contextlib.suppress(EngineError, httpx.RequestError, TimeoutError):
        async with asyncio.timeout(_GOODBYE_SECONDS):
            async for chunk in rest:
                usage = chunk.usage or usage
    return usage.prompt_tokens if usage else None
