"""The official client against a real server of a tiny policy: whatever it sends and reads, it gets what OpenAI's own API would give."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from alignkit_serve.store import inferences
from tests.fakes import tiny_folder
from tests.serve.running import Running, running, until

HELLO: list[Any] = [{"role": "user", "content": "Hello, who are you?"}]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('store') / 'store.db'}"
    else:
        url = request.getfixturevalue("postgres").new_database()
    with running(tiny_folder(), url) as started:
        yield started


@pytest.fixture
def client(server: Running) -> OpenAI:
    return server.openai()


def ask(client: OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": "live", "messages": HELLO, "max_tokens": 12, "seed": 3, **options})


def test_a_plain_answer_has_all_that_the_client_reads(client: OpenAI, server: Running) -> None:
    answer = ask(client)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (12, answer.usage.prompt_tokens + 12)
    assert answer.model_extra is not None
    assert answer.model_extra["alignkit"]["policy_version"] == answer.model
    assert answer._request_id is not None
    assert answer._request_id.startswith("req-")


def test_a_stream_says_the_same_as_the_whole_answer(client: OpenAI) -> None:
    whole = ask(client, logprobs=True, top_logprobs=2)
    chunks = list(ask(client, logprobs=True, top_logprobs=2, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole.choices[0].message.content
    tokens = [token for chunk in chunks if chunk.choices and chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content or []]
    assert whole.choices[0].logprobs is not None
    assert tokens == whole.choices[0].logprobs.content
    finishes = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert finishes == [None] * (len(finishes) - 1) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_streaming_helper_accumulates(client: OpenAI) -> None:
    text = ask(client).choices[0].message.content
    # It refuses to give an answer that was cut off by its length.
    with client.chat.completions.stream(model="live", messages=HELLO, max_tokens=12, seed=3, stop=text[4:6]) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == text[: text.index(text[4:6])]


def test_seeds_fix_answers_and_the_answers_of_one_request_differ(client: OpenAI) -> None:
    first, again, other = ask(client, n=3), ask(client, n=3), ask(client, n=3, seed=4)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert texts != [choice.message.content for choice in other.choices]
    assert len(set(texts)) == 3
    assert texts[0] == ask(client).choices[0].message.content
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert ask(client, seed=None).choices[0].message.content != ask(client, seed=None).choices[0].message.content


def test_several_streamed_answers_interleave_by_their_index(client: OpenAI) -> None:
    whole = ask(client, n=3)
    texts, finishes = ["", "", ""], [0, 0, 0]
    for chunk in ask(client, n=3, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        finishes[choice.index] += choice.finish_reason is not None
    assert texts == [choice.message.content for choice in whole.choices]
    assert finishes == [1, 1, 1]


def test_a_stop_string_is_cut_off_wherever_its_tokens_begin(client: OpenAI) -> None:
    text = ask(client, max_tokens=40).choices[0].message.content
    stop = text[7:10]  # the tiny tokenizer has a token a byte: three tokens or more
    stopped = ask(client, max_tokens=40, stop=["never said", stop])
    assert stopped.choices[0].message.content == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    streamed = ask(client, max_tokens=40, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == text[: text.index(stop)]


def test_temperature_0_takes_the_likeliest_token_each_time(client: OpenAI) -> None:
    answer = ask(client, temperature=0, logprobs=True, top_logprobs=1, seed=None)
    assert answer.choices[0].logprobs is not None
    for token in answer.choices[0].logprobs.content or []:
        assert token.bytes == token.top_logprobs[0].bytes
        assert token.logprob == token.top_logprobs[0].logprob


def test_a_bias_forces_a_token_and_penalties_keep_it_from_coming_again(client: OpenAI) -> None:
    letter = 4 + sorted(chr(i) for i in range(33, 127)).index("a")
    forced = ask(client, logit_bias={str(letter): 100}, max_tokens=4).choices[0].message.content
    assert len(set(forced)) == 1
    spread = ask(client, logit_bias={str(letter): 20}, frequency_penalty=2, temperature=0.2, max_tokens=40).choices[0].message.content
    assert len(set(spread)) > 1


def test_the_truths_for_training_come_with_the_answer_and_are_stored(client: OpenAI, server: Running) -> None:
    extras = {"alignkit": {"return_token_ids": True, "return_logprobs": "both", "consent": {"train": True, "version": "v1"}}}
    answer = ask(client, temperature=0.5, extra_body=extras, metadata={"topic": "greeting"})
    about = answer.choices[0].model_extra["alignkit"]
    assert len(about["token_ids"]) == len(about["logprobs"]["raw"]) == len(about["logprobs"]["behaviour"]) == 12
    assert about["logprobs"]["raw"] != about["logprobs"]["behaviour"]
    stored = server.store.read(lambda connection: inferences.get(connection, answer.id))
    assert stored is not None
    assert stored.status == "done"
    assert stored.inference.messages == HELLO
    assert stored.inference.params["temperature"] == 0.5
    assert (stored.inference.consent_train, stored.inference.consent_version) == (True, "v1")
    (completion,) = stored.completions
    assert completion.id == about["completion_id"]
    assert list(completion.token_ids) == about["token_ids"]
    assert completion.raw_logprobs == pytest.approx(about["logprobs"]["raw"], abs=1e-6)
    assert completion.behaviour_logprobs == pytest.approx(about["logprobs"]["behaviour"], abs=1e-6)
    assert completion.text == answer.choices[0].message.content


def test_stored_completions_are_listed_tagged_and_deleted(server: Running) -> None:
    client = server.openai(max_retries=0)
    own = OpenAI(base_url=client.base_url, api_key=server.key("infer", max_inflight=9))
    first, second = (ask(own, metadata={"n": str(i)}, store=True) for i in (1, 2))
    assert [one.id for one in own.chat.completions.list()] == [first.id, second.id]
    assert [one.id for one in own.chat.completions.list(order="desc", limit=1)] == [second.id, first.id]  # the client turns the pages
    assert [one.id for one in own.chat.completions.list(metadata={"n": "2"})] == [second.id]
    assert own.chat.completions.retrieve(first.id).choices[0].message.content == first.choices[0].message.content
    assert [turn.content for turn in own.chat.completions.messages.list(first.id)] == [HELLO[0]["content"]]
    assert own.chat.completions.update(first.id, metadata={"kept": "yes"}).metadata == {"kept": "yes"}
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.retrieve(first.id)  # another key's
    assert own.chat.completions.delete(first.id).deleted
    with pytest.raises(openai.NotFoundError):
        own.chat.completions.retrieve(first.id)
    assert [one.id for one in own.chat.completions.list()] == [second.id]


def test_what_is_not_to_be_stored_is_not(client: OpenAI, server: Running) -> None:
    answer = ask(client, store=False)
    assert server.store.read(lambda connection: inferences.get(connection, answer.id)) is None
    plain = client.completions.create(model="live", prompt="The film", max_tokens=2, extra_body={"store": False})
    assert server.store.read(lambda connection: inferences.get(connection, plain.id)) is None


def test_only_a_chat_that_is_done_can_be_tagged_or_deleted(client: OpenAI, server: Running) -> None:
    plain = client.completions.create(model="live", prompt="The film", max_tokens=2)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.update(plain.id, metadata={"a": "b"})
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.delete(plain.id)
    stored = server.store.read(lambda connection: inferences.get(connection, plain.id))
    assert stored is not None
    assert stored.inference.metadata == {}


def test_plain_completions(client: OpenAI) -> None:
    answer = client.completions.create(model="live", prompt=["The film was", "A dog"], max_tokens=6, seed=1, logprobs=1)
    assert answer.object == "text_completion"
    assert [choice.index for choice in answer.choices] == [0, 1]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.tokens or []) == len(logprobs.token_logprobs or []) == 6
    assert (logprobs.text_offset or [1])[0] == 0
    streamed = client.completions.create(model="live", prompt="The film was", max_tokens=6, seed=1, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == answer.choices[0].text


def test_models_are_listed_and_found(client: OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names[0] == "live"
    assert client.models.retrieve(names[1]).id == names[1]
    with pytest.raises(openai.NotFoundError) as missing:
        ask(client, model="gpt-4o")
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"


REFUSED = {
    "tools": {"tools": [{"type": "function", "function": {"name": "f"}}]},
    "response_format": {"response_format": {"type": "json_object"}},
    "messages[0].content[1]": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "http://x/"}}]}]
    },
    "messages[0].role": {"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]},
    "top_logprobs": {"top_logprobs": 3},
    "temperature": {"temperature": 3},
    "n": {"n": 17},
    "stop": {"stop": ["a", "b", "c", "d", "e"]},
    "max_tokens": {"max_tokens": 0},
    "logit_bias": {"logit_bias": {"word": 1}},
    "messages": {"messages": [{"role": "user", "content": "x" * 2000}]},
    "reasoning_effort": {"reasoning_effort": "high"},
    "alignkit.nonsense": {"extra_body": {"alignkit": {"nonsense": 1}}},
}


@pytest.mark.parametrize("param", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(client: OpenAI, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **REFUSED[param])
    assert (refused.value.param or "").startswith(param)
    assert refused.value.code
    assert refused.value.type == "invalid_request_error"


def test_an_unknown_field_is_named_and_refused_where_the_request_is_strict(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="live", messages=HELLO, max_tokens=1, extra_body={"mirostat": 2})
    assert raw.headers["x-alignkit-ignored"] == "mirostat"
    with pytest.raises(openai.BadRequestError, match="mirostat"):
        ask(client, extra_body={"mirostat": 2, "alignkit": {"strict": True}})


def test_keys_are_needed_and_their_scopes_hold(server: Running) -> None:
    with pytest.raises(openai.AuthenticationError) as wrong:
        ask(OpenAI(base_url=f"{server.url}/v1", api_key="ak_wrong", max_retries=0))
    assert wrong.value.code == "invalid_api_key"
    with pytest.raises(openai.PermissionDeniedError) as denied:
        ask(server.openai("feedback:read"))
    assert denied.value.code == "insufficient_scope"


def test_a_closed_stream_frees_its_row(client: OpenAI, server: Running) -> None:
    stream = ask(client, max_tokens=400, stream=True)
    next(iter(stream))
    stream.close()
    until(lambda: not server.service.answers)
    until(lambda: server.service.roster.live().engine.figures()["rows"] == 0)


def test_an_ab_pair_is_blind_and_its_slots_are_stored(client: OpenAI, server: Running) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="live",
        messages=HELLO,
        max_tokens=5,
        extra_body={"alignkit": {"ab": "pair", "ab_temperature": 0.1}},
    )
    assert "x-alignkit-policy" not in raw.headers
    answer = raw.parse()
    assert "policy_version" not in answer.model_extra["alignkit"]
    assert "@" not in answer.model
    assert len(answer.choices) == 2
    from alignkit_serve.store import groups

    group = server.store.read(lambda connection: groups.get_group(connection, answer.model_extra["alignkit"]["group_id"]))
    assert group is not None
    assert group.origin == "ab"
    assert sorted(group.presentation["slots"]) == [0, 1]
    assert [id for id, _ in group.candidates] == [choice.model_extra["alignkit"]["completion_id"] for choice in answer.choices]


def test_a_shadow_is_stored_and_not_shown(client: OpenAI, server: Running) -> None:
    answer = ask(client, extra_body={"alignkit": {"ab": "shadow"}})
    assert len(answer.choices) == 1
    stored = server.store.read(lambda connection: inferences.get(connection, answer.id))
    assert stored is not None
    assert len(stored.completions) == 2
    assert answer.usage.completion_tokens == 12
