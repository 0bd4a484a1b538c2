"""Asks the server at URL with KEY through langchain-openai and litellm, and asserts what their users see: python ... URL KEY"""

from __future__ import annotations

import os
import sys
from typing import Any

# Otherwise its import fetches a list of prices.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm
import openai
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

URL, KEY = sys.argv[1:]
HELLO = "Hello, who are you?"
TOOL = {"type": "function", "function": {"name": "weather", "description": "Of today.", "parameters": {"type": "object", "properties": {}}}}


def refused(kind: type[Exception], ask: Any) -> Any:
    """The error, which must be of this very kind or a more special one."""
    try:
        ask()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def model(**options: Any) -> ChatOpenAI:
    return ChatOpenAI(
        **{"model": "live", "base_url": URL, "api_key": KEY, "max_tokens": 12, "seed": 3, "temperature": 1.0, "max_retries": 0, **options}
    )


def langchain() -> str:
    """Returns what it was answered."""
    answer = model().invoke(HELLO)
    text = answer.content
    assert isinstance(text, str)
    assert text
    assert answer.response_metadata["finish_reason"] == "length"
    assert answer.response_metadata["model_name"].count("@") == 1
    assert answer.usage_metadata["output_tokens"] == 12
    assert answer.usage_metadata["total_tokens"] == answer.usage_metadata["input_tokens"] + 12
    assert model().invoke(HELLO).content == text
    assert model(seed=4).invoke(HELLO).content != text

    chunks = list(model().stream(HELLO))
    assert "".join(chunk.content for chunk in chunks) == text
    assert [chunk.response_metadata["finish_reason"] for chunk in chunks if "finish_reason" in chunk.response_metadata] == ["length"]
    used = [chunk.usage_metadata for chunk in model(stream_usage=True).stream(HELLO) if chunk.usage_metadata]
    assert used == [answer.usage_metadata]

    (several,) = model(n=3).generate([[HumanMessage(HELLO)]]).generations
    assert several[0].text == text
    assert len({one.text for one in several}) == 3

    logprobs = model().bind(logprobs=True, top_logprobs=2).invoke(HELLO).response_metadata["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in logprobs).decode(errors="replace") == text
    assert all(token["logprob"] < 0 and len(token["top_logprobs"]) == 2 for token in logprobs)

    stop = text[4:6]
    stopped = model().invoke(HELLO, stop=[stop])
    assert (stopped.content, stopped.response_metadata["finish_reason"]) == (text[: text.index(stop)], "stop")
    assert "".join(chunk.content for chunk in model().stream(HELLO, stop=[stop])) == text[: text.index(stop)]

    error = refused(openai.BadRequestError, lambda: model().bind_tools([TOOL]).invoke(HELLO))
    assert (error.code, error.param) == ("unsupported_value", "tools")
    error = refused(ContextOverflowError, lambda: model().invoke(HELLO * 500))
    assert error.code == "context_length_exceeded"
    assert refused(openai.AuthenticationError, lambda: model(api_key="ak_wrong").invoke(HELLO)).code == "invalid_api_key"
    assert refused(openai.NotFoundError, lambda: model(model="gpt-4o").invoke(HELLO)).code == "model_not_found"
    return text


def complete(**options: Any) -> Any:
    own = {"model": "openai/live", "api_base": URL, "api_key": KEY, "max_tokens": 12, "seed": 3, "max_retries": 0, "num_retries": 0}
    return litellm.completion(**{**own, "messages": [{"role": "user", "content": HELLO}], **options})


def lite(text: str) -> None:
    """``text``: what the other client was answered to the same request."""
    answer = complete()
    assert answer.choices[0].message.content == text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12

    chunks = list(complete(stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    used = [chunk.usage for chunk in chunks if getattr(chunk, "usage", None)]
    assert [(one.prompt_tokens, one.completion_tokens) for one in used] == [(answer.usage.prompt_tokens, 12)]

    several = [choice.message.content for choice in complete(n=3).choices]
    assert several[0] == text
    assert len(set(several)) == 3

    logprobs = complete(logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in logprobs).decode(errors="replace") == text
    assert all(token.logprob < 0 and len(token.top_logprobs) == 2 for token in logprobs)

    stop = text[4:6]
    stopped = complete(stop=stop).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (text[: text.index(stop)], "stop")

    hosted = complete(model="hosted_vllm/live", extra_body={"return_token_ids": True})
    assert hosted.choices[0].message.content == text

    assert "tools is not supported" in str(refused(litellm.BadRequestError, lambda: complete(tools=[TOOL])))
    refused(litellm.ContextWindowExceededError, lambda: complete(messages=[{"role": "user", "content": HELLO * 500}]))
    refused(litellm.AuthenticationError, lambda: complete(api_key="ak_wrong"))
    refused(litellm.NotFoundError, lambda: complete(model="openai/gpt-4o"))


lite(langchain())
print("both got what they expect")
