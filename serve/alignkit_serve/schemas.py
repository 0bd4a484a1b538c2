"""Requests as OpenAI's clients send them. Types are strict, sizes are bounded, and what nobody here can do is refused by name.

Fields that are not known are accepted, since clients of many servers send them, and named in the header ``X-Alignkit-Ignored``;
``alignkit: {strict: true}`` refuses them instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from alignkit.api import Message, Prompt
from alignkit_serve.errors import invalid, unsupported

Number = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, StringConstraints(min_length=0)]
"""Whole characters: pydantic looks only at a string with a bound, and half a surrogate pair is nothing that a tokenizer could read."""

Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)]


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class StreamOptions(_Request):
    """What a stream ends with."""

    include_usage: bool | None = None


class Consent(BaseModel):
    """Whether the person at the other end lets the conversation be trained on, and under which text of the question."""

    model_config = ConfigDict(strict=True, extra="forbid")

    train: bool
    version: Annotated[str, StringConstraints(max_length=64)] | None = None


class Extras(BaseModel):
    """What a server for training can do beyond OpenAI's API: one object, so that clients that do not know it go on working."""

    model_config = ConfigDict(strict=True, extra="forbid")

    policy: Annotated[str, StringConstraints(max_length=256)] | None = Field(None, description="the policy version that must answer")
    return_token_ids: bool = Field(False, description="with each choice, the ids of all tokens drawn")
    return_logprobs: Literal["raw", "behaviour", "both"] | None = Field(None, description="with each choice, those of all tokens drawn")
    ab: Literal["off", "pair", "shadow"] = Field("off", description="answers of two policies: shown side by side, or one kept aside")
    ab_temperature: Annotated[Number, Field(ge=0, le=2)] | None = Field(
        None, description="the second answer's, where one policy gives both"
    )
    episode_id: Annotated[str, StringConstraints(min_length=1, max_length=128)] | None = None
    consent: Consent | None = None
    strict: bool = Field(False, description="refuse fields that would be ignored")


class Sampled(_Request):
    """What chat and plain completions have in common."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1 << 30)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 20)] | None = Field(None, description="not OpenAI's: only the likeliest so many tokens")
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Annotated[Number, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, StringConstraints(max_length=512)] | None = None
    store: bool | None = Field(None, description="false: nothing but counters is kept")
    return_token_ids: bool | None = Field(None, description="vLLM's name for alignkit.return_token_ids")
    alignkit: Extras = Field(default_factory=Extras)

    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def biases(self) -> tuple[tuple[int, float], ...]:
        """Token ids with what is added to their logits. Raises ``ApiError`` for keys that are no ids."""
        found = []
        for key, value in (self.logit_bias or {}).items():
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise invalid(f'logit_bias has the key {key!r}; keys are token ids, such as "50256"', "logit_bias")
            found.append((int(key), value))
        return tuple(found)


class TextPart(_Request):
    """A piece of a message."""

    type: str
    text: Text | None = None


class ChatMessage(_Request):
    """One turn."""

    role: str
    content: Text | Annotated[list[TextPart], Field(max_length=256)] | None = None


class ChatRequest(Sampled):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 30)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    metadata: Metadata | None = None
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    tool_choice: Any = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    reasoning_effort: str | None = None
    chat_template: Any = None

    def refuse(self) -> None:
        """Raise ``ApiError`` for what no engine here can do."""
        for name in ("tools", "functions", "audio", "prediction", "web_search_options", "chat_template"):
            if getattr(self, name):
                raise unsupported(name, f"{name} is not supported by this server; leave it out")
        for name in ("tool_choice", "function_call"):
            if getattr(self, name) not in (None, "none", "auto"):
                raise unsupported(name, f"{name} is not supported by this server; leave it out")
        if self.response_format and self.response_format.get("type", "text") != "text":
            raise unsupported("response_format", 'response_format can only be {"type": "text"}: there is no grammar to hold an answer to')
        if self.modalities not in (None, [], ["text"]):
            raise unsupported("modalities", 'modalities can only be ["text"]')
        if self.reasoning_effort not in (None, "none"):
            raise unsupported("reasoning_effort", "reasoning_effort is not supported by this server; leave it out")
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs needs logprobs: true", "top_logprobs")

    def conversation(self) -> tuple[Message, ...]:
        """The turns as text. Raises ``ApiError`` for turns and parts that are not text."""
        return tuple(_message(message, i) for i, message in enumerate(self.messages))

    def tokens_wanted(self) -> int | None:
        """``max_completion_tokens`` wins over its older name."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Sampled):
    """``POST /v1/completions``: text to continue, or several."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=64)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    def refuse(self) -> None:
        """Raise ``ApiError`` for what no engine here can do."""
        if self.echo:
            raise unsupported("echo", "echo is not supported by this server; the prompt is known to who sent it")
        if self.suffix:
            raise unsupported("suffix", "suffix is not supported by this server: the model only continues")
        if self.best_of not in (None, self.n or 1):
            raise unsupported("best_of", "best_of is not supported by this server; ask for n and choose")

    def prompts(self) -> tuple[Prompt, ...]:
        """Each text as a plain prompt."""
        texts: Sequence[str] = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        return tuple(Prompt("", (Message("user", text),), plain=True) for text in texts)


class MetadataUpdate(BaseModel):
    """``POST /v1/chat/completions/{id}``: what a stored completion is tagged with from now on."""

    model_config = ConfigDict(strict=True, extra="forbid")

    metadata: Metadata | None


class StagePolicy(BaseModel):
    """``POST /v1/admin/policies``: a run, one of its stages or a transformers folder below the server's folder of models."""

    model_config = ConfigDict(strict=True, extra="forbid")

    path: Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00]+$")]
    promote: bool = False


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _message(message: ChatMessage, i: int) -> Message:
    where = f"messages[{i}]"
    if message.role not in _ROLES:
        raise unsupported(f"{where}.role", f"{where}.role is {message.role!r}; allowed: {', '.join(_ROLES)}")
    if (message.model_extra or {}).get("tool_calls") or message.content is None:
        raise unsupported(f"{where}.content", f"{where} has no text; tool calls are not supported by this server")
    if isinstance(message.content, str):
        return Message(_ROLES[message.role], message.content)
    for j, part in enumerate(message.content):
        if part.type != "text" or part.text is None:
            # Nothing that a request names is ever fetched.
            raise unsupported(f"{where}.content[{j}]", f"{where}.content[{j}] is of type {part.type!r}; allowed: text")
    return Message(_ROLES[message.role], "".join(part.text or "" for part in message.content))


_HARMLESS = frozenset(
    {"service_tier", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "verbosity"}
)
"""OpenAI's fields that ask for nothing a client would miss in an answer."""


def ignored(request: Sampled) -> list[str]:
    """Fields that nothing reads. Raises ``ApiError`` for them where the request is strict."""
    unread = sorted(request.model_extra or {})
    if isinstance(request, CompletionRequest):
        unread = sorted({*unread})
    if unread and request.alignkit.strict and (found := [name for name in unread if name not in _HARMLESS]):
        raise invalid(f"{', '.join(found)}: there is no such field, and the request is strict", found[0], "unknown_field")
    return unread
