"""Answers forwarded to another server: what it is asked, what becomes of what it says, and every way in which it can fail."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignkit.api import Message, Prompt
from alignkit.rollout.noise import noise_key
from alignkit_serve.engine import Capabilities, EngineError, Likely, Parameters, Piece, PromptError, Token
from alignkit_serve.http_engine import HttpEngine
from alignkit_serve.upstream import Events
from tests.serve.upstream import DONE, Reply, Upstream, chunk, event, models, one, ready_made, refusal, running_upstream, said

CHAT = Prompt("p", (Message("system", "Be brief."), Message("user", "Hello?")))
PLAIN = Prompt("p", (Message("user", "Once upon"),), plain=True)
ALIGNKIT = {"id": "m", "owned_by": "alignkit", "alignkit": {"policy_version": "v3", "context_tokens": 512}}


@pytest.fixture(scope="module")
def server() -> Iterator[Upstream]:
    with running_upstream() as running:
        yield running


@pytest.fixture
def upstream(server: Upstream) -> Upstream:
    """Without anything of the test before."""
    server.replies.clear()
    server.asked.clear()
    server.left.clear()
    return server


def using(upstream: Upstream, work: Callable[[HttpEngine], Awaitable[Any]], **options: Any) -> Any:
    """What ``work`` makes of an engine that forwards to ``upstream``."""

    async def run() -> Any:
        engine = HttpEngine(options.pop("url", upstream.url), options.pop("model", "m"), **{"timeout": 20.0, **options})
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(run())


async def pieces_of(engine: HttpEngine, prompt: Prompt = CHAT, **parameters: Any) -> list[Piece]:
    return [piece async for piece in engine.generate(engine.encode(prompt), Parameters(**parameters))]


Wanted = Mapping[str, Any]
NOTHING: Wanted = MappingProxyType({})


def answered(upstream: Upstream, *replies: Reply, prompt: Prompt = CHAT, wanted: Wanted = NOTHING, **options: Any) -> list[Piece]:
    upstream.will(*replies)
    return using(upstream, lambda engine: pieces_of(engine, prompt, **wanted), **options)


def failure(upstream: Upstream, *replies: Reply, kind: type[Exception] = EngineError, **options: Any) -> str:
    """The message of an answer that fails."""
    with pytest.raises(kind) as failed:
        answered(upstream, *replies, **options)
    assert type(failed.value) is kind
    return str(failed.value)


def text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def drawn(pieces: list[Piece]) -> list[Token]:
    return [token for piece in pieces for token in piece.drawn]


def shown(pieces: list[Piece]) -> list[Token]:
    return [token for piece in pieces for token in piece.shown]


def test_a_conversation_is_asked_for_as_a_streamed_chat_of_one_choice(upstream: Upstream) -> None:
    wanted = {
        "max_tokens": 9,
        "temperature": 0.25,
        "top_p": 0.5,
        "top_k": 7,
        "presence_penalty": 0.125,
        "frequency_penalty": -1.0,
        "logit_bias": ((50256, -100.0), (11, 1.5)),
        "stop": ("\n\n", "END"),
        "top_logprobs": 3,
        "noise": (17, 4),
    }
    answered(upstream, ready_made(), wanted=wanted, api_key="k-1", policy_version="policy-8")
    (asked,) = upstream.asked
    assert (asked.method, asked.path, asked.headers["authorization"]) == ("POST", "/v1/chat/completions", "Bearer k-1")
    assert asked.body == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}],
        "n": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 3,
        "return_token_ids": True,
        "max_tokens": 9,
        "temperature": 0.25,
        "top_p": 0.5,
        "top_k": 7,
        "presence_penalty": 0.125,
        "frequency_penalty": -1.0,
        "logit_bias": {"50256": -100.0, "11": 1.5},
        "stop": ["\n\n", "END"],
        "seed": noise_key(17, 0, "", 4) % 2**31,
        "cache_salt": "policy-8",
    }


def test_nothing_is_asked_for_that_was_not_wanted(upstream: Upstream) -> None:
    answered(upstream, ready_made())
    (asked,) = upstream.asked
    assert not asked.body.keys() & {"top_k", "stop", "logit_bias", "cache_salt", "alignkit"}
    assert asked.body["max_tokens"] is None
    assert "authorization" not in asked.headers


def test_every_answer_of_a_request_has_a_seed_of_its_own_and_it_is_31_bits_long(upstream: Upstream) -> None:
    for choice in range(8):
        answered(upstream, ready_made(), wanted={"noise": (2**62, choice)})
    seeds = [asked.body["seed"] for asked in upstream.asked]
    assert len(set(seeds)) == 8
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_plain_prompt_is_continued_and_its_older_form_of_log_probabilities_is_understood(upstream: Upstream) -> None:
    def part(text: str, finish: str | None, tokens: list[str], logprobs: list[float], top: list[dict[str, float]], ids: list[int]) -> bytes:
        listed = {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": [0] * len(tokens)}
        return event({"choices": [{"index": 0, "text": text, "logprobs": listed, "finish_reason": finish, "token_ids": ids}]})

    begin = part(" a time", None, [" a", " time"], [-0.5, -2.0], [{" a": -0.5, " the": -1.5}, {" time": -2.0, " day": -1.0}], [5, 6])
    end = part(".", "length", ["."], [-0.25], [{".": -0.25}], [7])
    pieces = answered(upstream, Reply((begin, end, DONE)), prompt=PLAIN, wanted={"top_logprobs": 1})
    time = Token(6, b" time", -2.0, None, (Likely(b" day", -1.0),))
    assert pieces[0].drawn == (Token(5, b" a", -0.5, None, (Likely(b" a", -0.5),)), time)
    assert (text(pieces), shown(pieces), pieces[-1].finished) == (" a time.", drawn(pieces), "length")
    (asked,) = upstream.asked
    assert asked.path == "/v1/completions"
    assert (asked.body["prompt"], asked.body["logprobs"], "messages" in asked.body) == ("Once upon", 1, False)


def test_the_text_is_what_the_upstream_said_to_the_last_character(upstream: Upstream) -> None:
    parts = ["One", "\u2028", " two\r\n\r\n", "data: [DONE]", "\n\nthr", "😀ée", '"\\"', " "]
    frames = [chunk(part, [one(part, -1.0)]) for part in parts]
    pieces = answered(upstream, Reply((*frames, chunk(finish="stop"), DONE)))
    assert [piece.text for piece in pieces] == [*parts, ""]
    assert [piece.finished for piece in pieces] == [None] * len(parts) + ["stop"]


def test_comments_fields_line_ends_and_cuts_of_the_stream_make_no_difference(upstream: Upstream) -> None:
    stream = b"".join(
        [
            b": ping\r\n\r\nretry: 10\r\nid: 7\r\nevent: message\r\n",
            chunk("He", [one("He", -1.0)]).replace(b"\n", b"\r\n"),
            b": ping\n\n",
            chunk("y", [one("y", -2.0)], "stop").replace(b"\n", b"\r").replace(b"data: ", b"data:"),
            b"\n",
            DONE,
        ]
    )
    pieces = answered(upstream, Reply([stream[i : i + 3] for i in range(0, len(stream), 3)]))
    assert (text(pieces), pieces[-1].finished) == ("Hey", "stop")


@given(st.lists(st.lists(st.sampled_from([b"a", b"", b" b:c", "\u2028\x85\x0b".encode()]), min_size=1, max_size=3), max_size=5), st.data())
def test_events_are_the_same_wherever_the_network_cuts_them(sent: list[list[bytes]], data: st.DataObject) -> None:
    end = data.draw(st.sampled_from([b"\n", b"\r\n"]))
    stream = b"".join(b"".join(b"data: " + line + end for line in lines) + b": x" + end + end for lines in sent)
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6))), len(stream)]
    events = Events()
    assert [one for i, j in itertools.pairwise(cuts) for one in events.feed(stream[i:j])] == [b"\n".join(lines) for lines in sent]


def test_tokens_come_with_ids_and_log_probabilities_and_with_no_behaviour_that_nobody_told(upstream: Upstream) -> None:
    tokens = [one("Hi", -0.5, ("Hi", -0.5), ("Ho", -0.25)), one(" you", -1.5, (" you", -1.5), (" me", -3.0))]
    pieces = answered(
        upstream,
        Reply((chunk("Hi you", tokens, token_ids=[10, 11]), chunk("", [one("<end>", -0.125)], "stop", token_ids=[2]), DONE)),
        wanted={"top_logprobs": 2},
    )
    first = Token(10, b"Hi", -0.5, None, (Likely(b"Ho", -0.25), Likely(b"Hi", -0.5)))
    second = Token(11, b" you", -1.5, None, (Likely(b" you", -1.5), Likely(b" me", -3.0)))
    assert pieces == [
        Piece("Hi you", (first, second), (first, second), None),
        Piece("", (), (Token(2, b"<end>", -0.125, None),), "stop"),
    ]


def test_ids_that_do_not_fit_the_tokens_are_not_guessed_at(upstream: Upstream) -> None:
    pieces = answered(upstream, Reply((chunk("ab", [one("a", -1.0), one("b", -1.0)], "length", token_ids=[3]), DONE)))
    assert [token.id for token in drawn(pieces)] == [None, None]


def tokens_shown(upstream: Upstream, *chunks: tuple[str, list[str | bytes]], finish: str = "stop") -> list[list[bytes]]:
    """The tokens that are shown with each of the chunks, which have a text and list what was drawn since the last."""
    frames = [chunk(text, [one(token, -1.0) for token in tokens]) for text, tokens in chunks[:-1]]
    last, tokens = chunks[-1]
    pieces = answered(upstream, Reply((*frames, chunk(last, [one(token, -1.0) for token in tokens], finish), DONE)))
    listed = [token.encode() if isinstance(token, str) else token for _, tokens in chunks for token in tokens]
    assert [token.data for token in drawn(pieces)] == listed
    return [[token.data for token in piece.shown] for piece in pieces]


def test_tokens_are_shown_with_their_text_even_when_it_lags_behind(upstream: Upstream) -> None:
    """A server holds text back that may become the stop string " STOP"; when it does, its tokens were drawn but are not shown."""
    for first in ("Go", " Go"):  # some tokenizers leave out the space that a text begins with
        chunks = ("", [first]), ("", [" S"]), ("Go S", ["low"]), ("low", [" ST"]), ("", ["OP"])
        assert tokens_shown(upstream, *chunks) == [[], [], [first.encode(), b" S"], [b"low"], []]
    assert tokens_shown(upstream, ("Go", [" Go"]), ("", [" S"]), (" Slow", ["low"])) == [[b" Go"], [], [b" S", b"low"]]


def test_a_token_is_shown_with_the_first_part_of_its_text(upstream: Upstream) -> None:
    assert tokens_shown(upstream, ("ab", ["abc", "de"]), ("cde", [])) == [[b"abc"], [b"de"]]


def test_half_a_character_at_the_end_of_a_long_answer_is_shown(upstream: Upstream) -> None:
    assert tokens_shown(upstream, ("a", ["a"]), ("", [b"\xf0\x9f"]), finish="length") == [[b"a"], [b"\xf0\x9f"]]


def test_a_character_of_several_tokens_is_shown_with_all_of_them(upstream: Upstream) -> None:
    smile = "😀".encode()
    whole = [chunk("", [one(smile[:2], -1.0)]), chunk("😀", [one(smile[2:], -2.0)]), chunk("!", [one("!", -3.0)], "stop")]
    # vLLM before it told the bytes of such tokens
    replaced = [chunk("", [one("\ufffd", -1.0)]), chunk("😀", [one("\ufffd", -2.0)]), chunk("!", [one("!", -3.0)], "stop")]
    for frames in (whole, replaced):
        pieces = answered(upstream, Reply((*frames, DONE)))
        assert [[token.raw for token in piece.shown] for piece in pieces] == [[], [-1.0, -2.0], [-3.0]]


def test_an_alignkit_server_tells_all_that_was_drawn_and_what_it_was_drawn_from(upstream: Upstream) -> None:
    def told(ids: list[int], raw: list[float], behaviour: list[float]) -> dict[str, Any]:
        return {"token_ids": ids, "logprobs": {"raw": raw, "behaviour": behaviour}}

    frames = [
        event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "alignkit": {"completion_id": "cmp-1"}}]}),
        chunk("Go", [one("Go", -1.0, ("No", -0.5))], alignkit=told([5, 6], [-1.0, -2.0], [-0.75, -1.75])),
        chunk(" Slow", [one(" S", -2.0), one("low", -3.0)], alignkit=told([7], [-3.0], [-2.75])),
        chunk("", [], alignkit=told([8, 9], [-4.0, -5.0], [-3.75, -4.75])),
        chunk(finish="stop"),
    ]
    upstream.will(models(ALIGNKIT), Reply((*frames, DONE)))

    async def story(engine: HttpEngine) -> list[Piece]:
        await engine.started()
        return await pieces_of(engine, stop=(" STOP",), top_logprobs=1)

    pieces = using(upstream, story)
    assert upstream.asked[1].body["alignkit"] == {"return_token_ids": True, "return_logprobs": "both"}
    go = Token(5, b"Go", -1.0, -0.75, (Likely(b"No", -0.5),))
    slow = (Token(6, b" S", -2.0, -1.75), Token(7, b"low", -3.0, -2.75))
    assert pieces == [
        Piece("Go", (go,), (go, Token(6, b"", -2.0, -1.75)), None),
        Piece(" Slow", slow, (slow[1],), None),
        Piece("", (), (Token(8, b"", -4.0, -3.75), Token(9, b"", -5.0, -4.75)), None),
        Piece("", (), (), "stop"),
    ]


def test_an_alignkit_server_that_shows_what_it_did_not_draw_is_not_believed(upstream: Upstream) -> None:
    upstream.will(models(ALIGNKIT), ready_made())

    async def story(engine: HttpEngine) -> None:
        await pieces_of(await engine.started())

    with pytest.raises(EngineError, match="did not tell that they were drawn"):
        using(upstream, story)


def test_what_the_list_of_models_tells_becomes_the_capabilities(upstream: Upstream) -> None:
    def capabilities(entry: dict[str, Any], **options: Any) -> Capabilities:
        upstream.will(models({"id": "another"}, entry))

        async def story(engine: HttpEngine) -> Capabilities:
            return (await engine.started()).capabilities()

        return using(upstream, story, **options)

    assert capabilities({"id": "m", "owned_by": "somebody"}) == Capabilities(None, 20, False, False, True, False)
    assert capabilities({"id": "m", "owned_by": "vllm", "max_model_len": 4096}) == Capabilities(4096, 20, False, True, True, False)
    assert capabilities(ALIGNKIT) == Capabilities(512, 20, True, True, True, False)
    assert capabilities(ALIGNKIT, logprobs=False) == Capabilities(512, -1, False, False, True, False)
    assert {(asked.method, asked.path) for asked in upstream.asked} == {("GET", "/v1/models")}


def started_message(upstream: Upstream, *replies: Reply, **options: Any) -> str:
    upstream.will(*replies)
    with pytest.raises(EngineError) as failed:
        using(upstream, lambda engine: engine.started(), **options)
    assert type(failed.value) is EngineError
    return str(failed.value)


def test_a_model_that_is_not_there_is_missed_at_the_start(upstream: Upstream) -> None:
    message = started_message(upstream, models({"id": "small"}, {"id": "large"}), model="lrage")
    assert message == f"{upstream.url} has no model 'lrage'; it has: large, small"


def test_what_is_no_api_at_all_is_noticed_at_the_start(upstream: Upstream) -> None:
    page = Reply((b"<html>Welcome to nginx!</html>",), content_type="text/html")
    assert "answers with no list of models" in started_message(upstream, page)
    assert "answers with no list of models" in started_message(upstream, Reply((b'{"data": [{"name": "m"}]}',)))
    assert "failed with status 400: no" in started_message(upstream, refusal(400, said("no")))


def test_the_address_may_leave_out_v1_and_end_in_a_slash(upstream: Upstream) -> None:
    for end in ("", "/", "/v1", "/v1/"):
        answered(upstream, ready_made(), url=f"http://localhost:{upstream.port}{end}")
    assert [asked.path for asked in upstream.asked] == ["/v1/chat/completions"] * 4


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://", "file:///etc/passwd", "http://host:99999", "http://[::1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(EngineError, match="one looks like http://127"):
        HttpEngine(url, "m")


def test_secrets_do_not_belong_into_an_address_and_are_not_repeated() -> None:
    with pytest.raises(EngineError, match="belongs into api_key") as failed:
        HttpEngine("http://user:hunter2@host/v1", "m")
    assert "hunter2" not in str(failed.value)
    with pytest.raises(EngineError, match="line break") as failed:
        HttpEngine("http://host/v1", "m", api_key="hunter2\n")
    assert "hunter2" not in str(failed.value)


def test_a_prompt_is_not_tokenised_here(upstream: Upstream) -> None:
    async def story(engine: HttpEngine) -> None:
        encoded = engine.encode(CHAT)
        assert (encoded.prompt, encoded.ids, encoded.tokens) == (CHAT, (), None)

    using(upstream, story)


def test_closing_the_iterator_closes_the_stream_of_the_upstream(upstream: Upstream) -> None:
    upstream.will(Reply((chunk("Hi", [one("Hi", -1.0)]),), then="waits"))

    async def story(engine: HttpEngine) -> None:
        pieces = engine.generate(engine.encode(CHAT), Parameters())
        assert (await anext(pieces)).text == "Hi"
        assert engine.figures() == {"rows": 1, "waiting": 0, "tokens": 1}
        await pieces.aclose()
        assert await asyncio.to_thread(upstream.left.wait, 20)
        assert engine.figures() == {"rows": 0, "waiting": 0, "tokens": 1}

    using(upstream, story)


def test_cancelling_whoever_waits_for_the_first_token_does_so_too(upstream: Upstream) -> None:
    upstream.will(Reply((b": ping\n\n",), then="waits"))

    async def story(engine: HttpEngine) -> None:
        task = asyncio.create_task(pieces_of(engine))
        while not upstream.asked:
            await asyncio.sleep(0.01)
        assert engine.figures() == {"rows": 0, "waiting": 1, "tokens": 0}
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(upstream.left.wait, 20)
        assert engine.figures() == {"rows": 0, "waiting": 0, "tokens": 0}

    using(upstream, story)


def test_a_complete_answer_is_heard_out_so_that_the_upstream_sees_no_one_leave(upstream: Upstream) -> None:
    """The second request comes over the same connection, which is so only where the first stream was read to its end."""
    upstream.will(ready_made(), ready_made())

    async def story(engine: HttpEngine) -> None:
        for _ in range(2):
            pieces = engine.generate(engine.encode(CHAT), Parameters())
            async for piece in pieces:
                if piece.finished:
                    break
            await pieces.aclose()

    using(upstream, story)
    first, second = upstream.connections[-2:]
    assert first == second


def test_a_stream_that_does_not_end_after_its_last_token_harms_no_answer(upstream: Upstream) -> None:
    pieces = answered(upstream, Reply((chunk("Hi", [one("Hi", -1.0)], "stop"),), then="waits"), timeout=0.3)
    assert (text(pieces), pieces[-1].finished) == ("Hi", "stop")
    pieces = answered(upstream, Reply((chunk("Hi", [one("Hi", -1.0)], "stop"),), then="breaks"))
    assert (text(pieces), pieces[-1].finished) == ("Hi", "stop")


@pytest.mark.parametrize(
    ("frames", "tokens"),
    [
        (ready_made().frames, 3),
        ((chunk("Hi", [one("Hi", -1.0)]), event({"choices": [{"finish_reason": "stop"}], "usage": {"prompt_tokens": 7}}), DONE), 7),
        ((chunk("Hi", [one("Hi", -1.0)], "stop"), DONE), None),
        ((chunk("Hi", [one("Hi", -1.0)], "stop"), event({"choices": [], "usage": None}), DONE), None),
        ((chunk("Hi", [one("Hi", -1.0)], "stop"), b"data: what?\n\n", DONE), None),
    ],
    ids=["after it", "with it", "not at all", "nothing", "garbage"],
)
def test_how_long_the_prompt_was_is_told_at_the_end_of_an_answer_or_never(
    upstream: Upstream, frames: tuple[bytes, ...], tokens: int | None
) -> None:
    pieces = answered(upstream, Reply(frames))
    assert text(pieces) == "Hi"
    assert [piece.prompt_tokens for piece in pieces] == [None] * (len(pieces) - 1) + [tokens]


def test_nothing_listens(upstream: Upstream) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        assert f"nothing answers at {url}" in failure(upstream, url=url)


def test_an_upstream_that_falls_silent_is_given_up_before_and_after_the_first_token(upstream: Upstream) -> None:
    silent = f"{upstream.url} has been silent for 0.3 s"
    assert failure(upstream, Reply(then="waits"), timeout=0.3) == silent
    assert failure(upstream, Reply((chunk("Hi", [one("Hi", -1.0)]),), then="waits"), timeout=0.3) == silent
    assert started_message(upstream, Reply(then="waits"), timeout=0.3) == silent


def test_a_refused_key_is_named_but_not_told(upstream: Upstream) -> None:
    message = failure(upstream, refusal(401, said("Incorrect API key: hunter2")), api_key="hunter2")
    assert message == f"{upstream.url} refuses the API key (status 401)"
    assert "asks for an API key" in failure(upstream, refusal(401, said("no")))
    assert "refuses the API key (status 403)" in started_message(upstream, refusal(403, said("no")), api_key="k")


def test_a_model_that_has_gone_is_named(upstream: Upstream) -> None:
    message = failure(upstream, refusal(404, said("The model `m` does not exist.")))
    assert "has no model 'm'" in message
    assert "The model `m` does not exist." in message


@pytest.mark.parametrize(
    "body",
    [
        said("too  many\ntokens"),
        {"object": "error", "message": "too many tokens", "type": "BadRequestError", "param": None, "code": 400},
        {"error": "too many tokens"},
        {"detail": "too many tokens"},
        b"too many tokens",
    ],
)
def test_a_prompt_that_the_upstream_does_not_take_is_refused_in_its_own_words(upstream: Upstream, body: Any) -> None:
    for status in (400, 413, 422):
        assert failure(upstream, refusal(status, body), kind=PromptError) == "too many tokens"


@pytest.mark.parametrize("body", [said("boom"), b"Internal Server Error: boom", {"detail": [{"loc": [], "msg": "boom"}]}])
def test_a_failure_of_the_upstream_is_told_in_one_line(upstream: Upstream, body: Any) -> None:
    message = failure(upstream, refusal(500, body))
    assert message.startswith(f"{upstream.url} failed with status 500: ")
    assert "boom" in message
    assert "\n" not in message
    assert len(failure(upstream, refusal(500, b"long " * 10_000))) < 400
    assert "it does not say why" in failure(upstream, refusal(502, b""))


def test_a_redirect_is_not_followed(upstream: Upstream) -> None:
    elsewhere = refusal(307, b"", location=f"http://127.0.0.1:{upstream.port}/v1/elsewhere")
    assert "redirects are not followed" in failure(upstream, elsewhere, ready_made())
    assert len(upstream.asked) == 1


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_upstream_is_asked_again_when_it_wants_to_be(upstream: Upstream, status: int) -> None:
    busy = refusal(status, said("queue full"), retry_after="0.2")
    begin = time.monotonic()
    pieces = answered(upstream, busy, busy, ready_made())
    assert text(pieces) == "Hi"
    assert time.monotonic() - begin >= 0.4
    assert [asked.body for asked in upstream.asked] == [upstream.asked[0].body] * 3


def test_a_busy_upstream_is_not_asked_for_ever(upstream: Upstream) -> None:
    busy = refusal(429, said("queue full"), retry_after="0")
    message = failure(upstream, *[busy] * 4, ready_made())
    assert message == f"{upstream.url} is busy (status 429, asked 4 times): queue full"
    assert len(upstream.asked) == 4


@pytest.mark.parametrize("headers", [{}, {"retry_after": "3600"}, {"retry_after": "soon"}, {"retry_after": "-1"}, {"retry_after": "nan"}])
def test_a_busy_upstream_that_names_no_near_time_is_not_waited_for(upstream: Upstream, headers: dict[str, str]) -> None:
    assert "is busy (status 503, asked 1 times): loading" in failure(upstream, refusal(503, said("loading"), **headers), ready_made())
    assert len(upstream.asked) == 1


def partly(upstream: Upstream, reply: Reply, **options: Any) -> tuple[str, str]:
    """The text that came, and the message of the failure that came then. It is not asked a second time."""
    upstream.will(reply, ready_made())
    seen: list[Piece] = []

    async def story(engine: HttpEngine) -> None:
        async for piece in engine.generate(engine.encode(CHAT), Parameters()):
            seen.append(piece)

    with pytest.raises(EngineError) as failed:
        using(upstream, story, **options)
    assert len(upstream.asked) == 1
    return text(seen), str(failed.value)


BEGUN = chunk("Hi", [one("Hi", -1.0)])


def test_an_error_in_mid_stream_ends_the_answer_with_its_message(upstream: Upstream) -> None:
    sent = Reply((BEGUN + event(said('the "engine" died')), DONE))
    assert partly(upstream, sent) == ("Hi", f'{upstream.url} gave up an answer: the "engine" died')


@pytest.mark.parametrize(
    "error",
    [
        {"object": "error", "message": "out of memory", "code": 500},
        {"error": {"code": 500, "message": "out of memory"}, "choices": [{"delta": {"content": ""}, "finish_reason": "error"}]},
        {"error": "out of memory"},
    ],
)
def test_an_error_event_of_another_form_does_so_too(upstream: Upstream, error: dict[str, Any]) -> None:
    assert partly(upstream, Reply((BEGUN, event(error)))) == ("Hi", f"{upstream.url} gave up an answer: out of memory")


def test_a_connection_that_breaks_in_mid_stream(upstream: Upstream) -> None:
    came, message = partly(upstream, Reply((BEGUN,), then="breaks"))
    assert came == "Hi"
    assert message.startswith(f"the connection to {upstream.url} broke: ")


@pytest.mark.parametrize("end", [b"", DONE, b'data: {"choices": [{"delta": {"content": " yo'])
def test_a_stream_that_ends_without_a_reason_is_no_answer(upstream: Upstream, end: bytes) -> None:
    assert partly(upstream, Reply((BEGUN, end))) == (
        "Hi",
        f"{upstream.url} ended an answer in the middle: its stream closed without a finish_reason",
    )


@pytest.mark.parametrize(
    "garbage",
    [
        b"data: oops\n\n",
        b"data: [1, 2]\n\n",
        b"data: {}\n\n",
        b'data: {"choices": 5}\n\n',
        chunk(" yo", [{"token": " yo", "logprob": "high"}]),
        chunk(" yo", [{"token": " yo", "logprob": -1.0, "bytes": [300]}]),
        event({"choices": [{"text": " yo", "logprobs": {"tokens": [" yo"], "token_logprobs": []}}]}),
        event({"choices": [{"text": " yo", "alignkit": {"token_ids": [1, 2], "logprobs": {"raw": [-1.0], "behaviour": [-1.0]}}}]}),
        b"data: " + b"[" * 100_000 + b"\n\n",
        b"data: \xff\xfe\n\n",
    ],
)
def test_garbage_in_mid_stream_is_no_answer_and_is_not_repeated(upstream: Upstream, garbage: bytes) -> None:
    came, message = partly(upstream, Reply((BEGUN, garbage, chunk(finish="stop"), DONE)))
    assert came == "Hi"
    assert "not a chunk of an answer" in message or "an event without choices" in message
    assert " yo" not in message
    assert len(message) < 300


def test_an_event_without_an_end_is_given_up(upstream: Upstream) -> None:
    assert "an event of more than 16 MiB" in partly(upstream, Reply((BEGUN, b"data: " + b"x" * (17 << 20)), then="waits"))[1]


@pytest.mark.parametrize("reason", ["content_filter", "tool_calls", "abort"])
def test_an_answer_that_ended_for_a_reason_that_no_policy_has_is_no_answer(upstream: Upstream, reason: str) -> None:
    assert f"finish_reason '{reason}'" in partly(upstream, Reply((BEGUN, chunk(finish=reason), DONE)))[1]


def test_an_upstream_that_does_not_stream_is_noticed(upstream: Upstream) -> None:
    whole = Reply((json.dumps({"choices": [{"message": {"content": "Hi"}}]}).encode(),), content_type="application/json")
    assert "answers with application/json instead of text/event-stream" in failure(upstream, whole)


def test_an_upstream_without_log_probabilities_is_refused(upstream: Upstream) -> None:
    for frame in (chunk("Hi"), chunk("Hi", []), chunk("", None, token_ids=[4])):
        assert "gives no log-probabilities" in failure(upstream, Reply((frame, chunk(finish="stop"), DONE)))


def test_an_upstream_without_log_probabilities_can_be_put_up_with(upstream: Upstream) -> None:
    pieces = answered(upstream, Reply((chunk("Hi"), chunk(""), chunk(" you"), chunk(finish="stop"), DONE)), logprobs=False)
    assert not upstream.asked[0].body.keys() & {"logprobs", "top_logprobs", "return_token_ids"}
    assert shown(pieces) == drawn(pieces) == [Token(None, b"Hi", None, None), Token(None, b" you", None, None)]
    assert (text(pieces), pieces[-1].finished) == ("Hi you", "stop")


def test_an_answer_that_ends_at_once_needs_no_tokens(upstream: Upstream) -> None:
    assert answered(upstream, Reply((chunk(finish="stop"), DONE))) == [Piece("", (), (), "stop")]


def behind(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    behind(monkeypatch, "http://127.0.0.1:9")
    for host in ("127.0.0.1", "localhost"):
        assert text(answered(upstream, ready_made(), url=f"http://{host}:{upstream.port}/v1")) == "Hi"


def test_a_proxy_of_the_environment_is_asked_for_others(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    behind(monkeypatch, f"http://127.0.0.1:{upstream.port}")
    assert text(answered(upstream, ready_made(), url="http://upstream.example/v1")) == "Hi"
    assert upstream.asked[0].headers["host"] == "upstream.example"


def test_figures_count_rows_and_tokens(upstream: Upstream) -> None:
    upstream.will(ready_made(), ready_made(), refusal(500, said("boom")))

    async def story(engine: HttpEngine) -> None:
        await pieces_of(engine)
        await pieces_of(engine)
        with pytest.raises(EngineError):
            await pieces_of(engine)
        assert engine.figures() == {"rows": 0, "waiting": 0, "tokens": 2}

    using(upstream, story)


def test_many_answers_grow_at_once(upstream: Upstream) -> None:
    """More than a connection pool allows by itself."""
    upstream.will(*[Reply((BEGUN,), then="waits")] * 120)

    async def story(engine: HttpEngine) -> None:
        answers = [engine.generate(engine.encode(CHAT), Parameters()) for _ in range(120)]
        await asyncio.gather(*(anext(pieces) for pieces in answers))
        assert engine.figures() == {"rows": 120, "waiting": 0, "tokens": 120}
        await asyncio.gather(*(pieces.aclose() for pieces in answers))

    using(upstream, story)
