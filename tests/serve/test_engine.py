"""The engines under everything that requests can do to each other: joins, leaves, ends. Each answer is the one that it gets alone."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import openai
import pytest
import torch

from alignkit.api import Message, Prompt
from alignkit.data.collate import collate
from alignkit.models import kernels
from alignkit.models.causal_lm import CausalPolicy
from alignkit.models.decoding import Decoding
from alignkit.rollout.noise import noise_key
from alignkit.types import TokenRow
from alignkit_serve.engine import EngineError, Parameters, Piece
from alignkit_serve.http_engine import HttpEngine
from alignkit_serve.loading import load_upstream
from alignkit_serve.torch_engine import TorchEngine
from tests.fakes import tiny_folder, tiny_policy
from tests.serve.running import Running, running, until

CONTEXT = 512
TEXTS = ["a", "The film was", "What do you think of it?", "Longer prompts come in beside shorter ones, and some take a while.", "xyz"]
PLAIN = Prompt("", (Message("user", TEXTS[1]),), plain=True)
CHAT = Prompt("", (Message("system", "Be brief."), Message("user", TEXTS[2])))


@pytest.fixture(scope="module")
def policy() -> Iterator[CausalPolicy]:
    """Computes as a server does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_chosen", kernels.for_serving())
        yield tiny_policy(trainable=False)


@asynccontextmanager
async def started(policy: Any, **options: int) -> AsyncIterator[TorchEngine]:
    engine = await TorchEngine(policy, policy.codec, **{"context_tokens": CONTEXT, "max_rows": 5, **options}).started()
    try:
        yield engine
    finally:
        await engine.close()


def using(policy: Any, work: Callable[[TorchEngine], Awaitable[Any]], **options: int) -> Any:
    async def run() -> Any:
        async with started(policy, **options) as engine:
            return await work(engine)

    return asyncio.run(run())


async def answer(engine: Any, prompt: Prompt, parameters: Parameters, *, at_most: int = 1 << 30) -> list[Piece]:
    """The pieces; after ``at_most`` of them nobody wants any more."""
    pieces: list[Piece] = []
    async with contextlib.aclosing(engine.generate(engine.encode(prompt), parameters)) as coming:
        async for piece in coming:
            pieces.append(piece)
            if len(pieces) == at_most:
                break
    return pieces


def requests(order: random.Random) -> list[tuple[Prompt, Parameters]]:
    """24 of them, each with parameters of its own."""
    found = []
    for i in range(24):
        parameters = Parameters(
            max_tokens=order.randrange(3, 40),
            temperature=order.choice([0.0, 0.3, 1.0, 1.7]),
            top_p=order.choice([1.0, 1.0, 0.9, 0.2]),
            top_k=order.choice([0, 0, 1, 7, 1000]),
            presence_penalty=order.choice([0.0, 0.5, -0.5]),
            frequency_penalty=order.choice([0.0, 1.0]),
            logit_bias=((order.randrange(4, 260), 5.0), (3, -2.0)) if i % 3 == 0 else (),
            stop=(chr(order.randrange(33, 127)), "ab") if i % 4 == 0 else (),
            top_logprobs=order.choice([0, 0, 3, 20]),
            noise=(order.randrange(1 << 31), i),
        )
        found.append((Prompt("", (Message("user", TEXTS[i % len(TEXTS)]),), plain=i % 2 == 0), parameters))
    return found


def test_answers_of_a_crowd_that_comes_and_goes_are_those_that_each_gets_alone(policy: CausalPolicy) -> None:
    order = random.Random(3)
    asked = requests(order)
    # Some leave after so many pieces.
    leaves = {i: order.randrange(1, 4) for i in order.sample(range(len(asked)), 6)}

    async def work(engine: TorchEngine) -> tuple[list[list[Piece]], list[list[Piece]], bool]:
        alone = [await answer(engine, *one) for one in asked]

        async def comes(i: int) -> list[Piece]:
            await asyncio.sleep(order.random() / 4)
            return await answer(engine, *asked[i], at_most=leaves.get(i, 1 << 30))

        crowd = await asyncio.gather(*(comes(i) for i in range(len(asked))))
        assert engine.figures()["rows"] <= 5
        return alone, list(crowd), engine.capabilities().batch_invariant

    alone, crowd, invariant = using(policy, work)
    for i, pieces in enumerate(crowd):
        assert len(pieces) == min(len(alone[i]), leaves.get(i, 1 << 30))
    alone = [want[: len(pieces)] for want, pieces in zip(alone, crowd, strict=True)]
    if invariant:
        assert crowd == alone
    else:  # where the products round by the number of rows, a tie may fall otherwise, and all that follows with it
        assert sum(ids(pieces) != ids(want) for pieces, want in zip(crowd, alone, strict=True)) <= 2


def ids(pieces: Sequence[Piece]) -> list[int | None]:
    return [token.id for piece in pieces for token in piece.drawn]


def taught(policy: CausalPolicy, sequence: Sequence[int]) -> list[float]:
    """The trainer's log-probabilities of all tokens but the first."""
    with torch.no_grad():
        logprobs: list[float] = (
            policy.score_tokens(collate([TokenRow("", tuple(sequence), (True,) * len(sequence))])).logprobs[0, 1:].tolist()
        )
    return logprobs


def test_the_models_own_log_probabilities_are_the_trainers(policy: CausalPolicy) -> None:
    async def work(engine: TorchEngine) -> list[tuple[tuple[int, ...], list[Piece]]]:
        asked = requests(random.Random(8))
        found = await asyncio.gather(*(answer(engine, *one) for one in asked))
        return [(engine.encode(prompt).ids, pieces) for (prompt, _), pieces in zip(asked, found, strict=True)]

    for prompt, pieces in using(policy, work, max_rows=8):
        raw = [token.raw for piece in pieces for token in piece.drawn]
        assert raw == pytest.approx(taught(policy, [*prompt, *ids(pieces)])[len(prompt) - 1 :], abs=1e-4)


def test_scores_are_the_trainers(policy: CausalPolicy) -> None:
    sequence = [*range(40, 90), 3, 0, 259]
    assert using(policy, lambda engine: engine.score(sequence)) == pytest.approx(taught(policy, sequence), abs=1e-4)


def test_what_the_prompt_leaves_of_the_context_is_filled_and_no_more(policy: CausalPolicy) -> None:
    endless = Parameters(logit_bias=((3, -100.0),))
    pieces = using(policy, lambda engine: answer(engine, PLAIN, endless), context_tokens=30)
    assert len(ids(pieces)) == 30 - len(TEXTS[1])
    assert pieces[-1].finished == "length"


def test_whoever_leaves_while_waiting_never_comes_in(policy: CausalPolicy) -> None:
    endless = Parameters(max_tokens=400, logit_bias=((3, -100.0),))

    async def work(engine: TorchEngine) -> None:
        async with contextlib.aclosing(engine.generate(engine.encode(PLAIN), endless)) as first:
            await anext(first)
            waiting = asyncio.ensure_future(answer(engine, PLAIN, endless))
            while not engine.figures()["waiting"]:
                await anext(first)
            waiting.cancel()
            while engine.figures()["waiting"]:
                await anext(first)
            assert engine.figures()["rows"] == 1
        while engine.figures()["rows"]:
            await asyncio.sleep(0.01)

    using(policy, work, max_rows=1)


class Breaking:
    """A policy whose model raises what is in ``broken``, each thing once."""

    def __init__(self, policy: CausalPolicy, *broken: Exception) -> None:
        self._policy = policy
        self.codec = policy.codec
        self.broken = list(broken)

    @contextmanager
    def decoding(self) -> Iterator[Decoding]:
        with self._policy.decoding() as model:
            whole = model.hidden

            def hidden(*given: Any) -> Any:
                if self.broken:
                    raise self.broken.pop()
                return whole(*given)

            with mock.patch.object(model, "hidden", hidden):
                yield model


def test_an_engine_that_breaks_tells_everyone_at_once_and_everyone_later(policy: CausalPolicy) -> None:
    breaking = Breaking(policy)
    endless = Parameters(max_tokens=400, logit_bias=((3, -100.0),))

    async def work(engine: TorchEngine) -> None:
        first = engine.generate(engine.encode(PLAIN), endless)
        await anext(first)
        others = [asyncio.ensure_future(answer(engine, CHAT, endless)) for _ in range(3)]  # two grow, one waits
        breaking.broken.append(RuntimeError("a cable is loose"))
        score = asyncio.ensure_future(engine.score([5, 6, 7]))

        async def rest() -> None:
            async for _ in first:
                pass

        told = await asyncio.wait_for(asyncio.gather(rest(), *others, score, return_exceptions=True), 30)
        assert [str(error) for error in told] == ["the engine has stopped: RuntimeError: a cable is loose"] * 5
        for later in (answer(engine, PLAIN, endless), engine.score([5, 6, 7])):
            with pytest.raises(EngineError, match="a cable is loose"):
                await asyncio.wait_for(later, 30)

    using(breaking, work, max_rows=3)


def test_memory_that_does_not_suffice_costs_the_answers_of_that_moment_and_no_later_one(policy: CausalPolicy) -> None:
    breaking = Breaking(policy)
    endless = Parameters(max_tokens=400, logit_bias=((3, -100.0),))
    shorter = Parameters(max_tokens=300, noise=(1, 0), logit_bias=((3, -100.0),))

    async def work(engine: TorchEngine) -> None:
        before = await answer(engine, CHAT, shorter)
        growing = [engine.generate(engine.encode(PLAIN), endless) for _ in range(4)]
        for one in growing:
            await anext(one)
        slow = growing.pop(0)  # whose reader hears of it late
        waiting = asyncio.ensure_future(answer(engine, PLAIN, endless))
        while not engine.figures()["waiting"]:
            await anext(growing[0])
        breaking.broken.append(MemoryError())

        async def rest(one: AsyncIterator[Piece]) -> None:
            async for _ in one:
                pass

        told = await asyncio.wait_for(asyncio.gather(*(rest(one) for one in growing), waiting, return_exceptions=True), 30)
        assert [(type(error), str(error)) for error in told] == [(EngineError, "out of memory; ask again, for less at once")] * 4
        assert engine.problem() is None
        # The new decoder counts from 0 again: whoever leaves late takes none along that has the number it had.
        again = [asyncio.ensure_future(answer(engine, CHAT, shorter)) for _ in range(4)]
        while engine.figures()["waiting"] != 2:
            await asyncio.sleep(0.001)
        await slow.aclose()
        assert await asyncio.wait_for(asyncio.gather(*again), 30) == [before] * 4

        crowd = [asyncio.ensure_future(answer(engine, PLAIN, endless)) for _ in range(3)]
        while engine.figures()["waiting"] != 1:
            await asyncio.sleep(0.01)
        assert engine.figures()["rows"] == 2  # half of what did not fit
        for one in crowd:
            one.cancel()

    using(breaking, work, max_rows=4)


def test_a_single_answer_that_does_not_fit_leaves_the_room_as_it_was(policy: CausalPolicy) -> None:
    breaking = Breaking(policy)
    endless = Parameters(max_tokens=400, logit_bias=((3, -100.0),))

    async def work(engine: TorchEngine) -> None:
        breaking.broken.append(torch.OutOfMemoryError("CUDA out of memory"))
        with pytest.raises(EngineError, match="out of memory"):
            await answer(engine, PLAIN, endless)
        crowd = [asyncio.ensure_future(answer(engine, PLAIN, endless)) for _ in range(3)]
        while engine.figures()["rows"] != 3:
            await asyncio.sleep(0.01)
        for one in crowd:
            one.cancel()

    using(breaking, work, max_rows=3)


def test_a_score_that_does_not_fit_disturbs_nobody(policy: CausalPolicy) -> None:
    breaking = Breaking(policy)

    async def work(engine: TorchEngine) -> None:
        want = await engine.score([5, 6, 7])
        breaking.broken.append(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
        with pytest.raises(EngineError, match="out of memory"):
            await asyncio.wait_for(engine.score([5, 6, 7]), 30)
        assert await engine.score([5, 6, 7]) == want

    using(breaking, work)


def test_an_engine_that_cannot_begin_says_so(policy: CausalPolicy) -> None:
    breaking = Breaking(policy, RuntimeError("a cable is loose"))

    async def nothing(engine: TorchEngine) -> None:
        raise AssertionError("it has begun")

    with pytest.raises(EngineError, match="a cable is loose"):
        using(breaking, nothing)


def test_an_engine_that_is_closed_tells_everyone(policy: CausalPolicy) -> None:
    endless = Parameters(max_tokens=400, logit_bias=((3, -100.0),))

    async def work(engine: TorchEngine) -> None:
        growing = [asyncio.ensure_future(answer(engine, PLAIN, endless)) for _ in range(4)]
        while not engine.figures()["waiting"]:
            await asyncio.sleep(0.01)
        await engine.close()
        told = await asyncio.wait_for(asyncio.gather(*growing, return_exceptions=True), 30)
        assert [str(error) for error in told] == ["the engine has stopped: it was closed"] * 4
        with pytest.raises(EngineError, match="it was closed"):
            await answer(engine, PLAIN, endless)

    using(policy, work, max_rows=2)


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tiny_folder(), f"sqlite:///{tmp_path_factory.mktemp('upstream') / 'store.db'}") as started:
        yield started


def test_a_bias_for_a_token_that_there_is_not_is_refused_and_harms_nobody(upstream: Running) -> None:
    with upstream.http() as client:
        ask = {"model": "live", "prompt": "a", "max_tokens": 2}
        refused = client.post("/v1/completions", json={**ask, "logit_bias": {"5": 1, "260": 1}})
        assert refused.json()["error"]["param"] == "logit_bias"
        assert "260; this policy has those from 0 to 259" in refused.json()["error"]["message"]
        assert client.post("/v1/completions", json={**ask, "logit_bias": {"259": 1}}).status_code == 200


def test_half_of_a_surrogate_pair_is_refused_before_a_tokenizer_sees_it(upstream: Running) -> None:
    half = "\\ud83d"
    with upstream.http() as client:
        for path, asks in (
            ("chat/completions", f'"messages": [{{"role": "user", "content": "{half}"}}]'),
            ("chat/completions", f'"messages": [{{"role": "user", "content": [{{"type": "text", "text": "{half}"}}]}}]'),
            ("completions", f'"prompt": "{half}"'),
            ("completions", f'"prompt": ["a", "{half}"]'),
        ):
            response = client.post(f"/v1/{path}", content='{"model": "live", ' + asks + "}", headers={"Content-Type": "application/json"})
            assert response.status_code == 400
            assert "unicode" in response.json()["error"]["message"]


def forwarding(upstream: Running, work: Callable[[HttpEngine], Awaitable[Any]]) -> Any:
    """What ``work`` makes of an engine that forwards to ``upstream``."""

    async def run() -> Any:
        engine = await HttpEngine(upstream.url, "live", api_key=upstream.key("infer")).started()
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(run())


def asked_directly(upstream: Running, prompt: Prompt, parameters: Parameters) -> tuple[str, str, dict[str, Any]]:
    """Text, finish reason and what training needs, of the upstream itself and with the seed that a forwarded request has."""
    seed, number = parameters.noise
    body: dict[str, Any] = {
        "model": "live",
        "max_tokens": parameters.max_tokens,
        "temperature": parameters.temperature,
        "top_p": parameters.top_p,
        "top_k": parameters.top_k,
        "presence_penalty": parameters.presence_penalty,
        "frequency_penalty": parameters.frequency_penalty,
        "logit_bias": {str(id): bias for id, bias in parameters.logit_bias},
        "stop": list(parameters.stop),
        "seed": noise_key(seed, 0, "", number) & 0x7FFFFFFF,
        "alignkit": {"return_token_ids": True, "return_logprobs": "both"},
    }
    with upstream.http() as client:
        if prompt.plain:
            found = client.post("/v1/completions", json={**body, "prompt": prompt.messages[0].content}).json()["choices"][0]
            return found["text"], found["finish_reason"], found["alignkit"]
        messages = [{"role": turn.role, "content": turn.content} for turn in prompt.messages]
        found = client.post("/v1/chat/completions", json={**body, "messages": messages}).json()["choices"][0]
        return found["message"]["content"], found["finish_reason"], found["alignkit"]


@pytest.mark.parametrize("prompt", [PLAIN, CHAT], ids=["plain", "chat"])
def test_a_forwarded_answer_is_the_upstreams_own(upstream: Running, prompt: Prompt) -> None:
    # Of a continuation the API gives at most 5 alternatives.
    asked = [replace(one, top_logprobs=min(one.top_logprobs, 5)) for _, one in requests(random.Random(5))][:8]
    texts = [asked_directly(upstream, prompt, one)[0] for one in asked]
    asked += [replace(one, stop=(text[2:4], "never said")) for one, text in zip(asked, texts, strict=True) if len(text) > 3]

    async def work(engine: HttpEngine) -> list[list[Piece]]:
        return list(await asyncio.gather(*(answer(engine, prompt, parameters) for parameters in asked)))

    reasons = set()
    for parameters, pieces in zip(asked, forwarding(upstream, work), strict=True):
        text, reason, about = asked_directly(upstream, prompt, parameters)
        drawn = [token for piece in pieces for token in piece.drawn]
        assert "".join(piece.text for piece in pieces) == text
        assert pieces[-1].finished == reason
        assert ids(pieces) == about["token_ids"]
        assert [token.raw for token in drawn] == about["logprobs"]["raw"]
        assert [token.behaviour for token in drawn] == about["logprobs"]["behaviour"]
        if not prompt.plain:  # of a continuation the API does not tell bytes
            # Special tokens, which come first, have no text.
            shown = b"".join(token.data for piece in pieces for token in piece.shown if (token.id or 0) > 3)
            assert shown.decode(errors="replace").startswith(text.rstrip("\ufffd"))
        reasons.add(reason)
    assert reasons == {"stop", "length"}


def test_a_forwarded_answer_that_nobody_wants_frees_the_upstreams_row(upstream: Running) -> None:
    endless = Parameters(max_tokens=400, logit_bias=((3, -100.0),))
    pieces = forwarding(upstream, lambda engine: answer(engine, CHAT, endless, at_most=2))
    assert len(pieces) == 2
    until(lambda: not upstream.service.answers)
    until(lambda: upstream.service.roster.live().engine.figures()["rows"] == 0)


def test_a_server_on_top_of_a_server_answers_the_official_client(upstream: Running, tmp_path: Path) -> None:
    load = partial(load_upstream, url=upstream.url, key=upstream.key("infer"))
    options: dict[str, Any] = {"model": "live", "messages": [{"role": "user", "content": TEXTS[2]}], "max_tokens": 12}
    with running(Path("live"), f"sqlite:///{tmp_path / 'store.db'}", load=load, models=Path.cwd()) as server:
        client, below = server.openai(), upstream.openai()
        whole = client.chat.completions.create(**options, seed=3, n=2, logprobs=True, top_logprobs=2)
        for choice in whole.choices:
            seed = noise_key(3, 0, "", choice.index) & 0x7FFFFFFF
            single = below.chat.completions.create(**options, seed=seed, logprobs=True, top_logprobs=2)
            direct = single.choices[0]
            assert choice.message.content == direct.message.content
            assert choice.logprobs == direct.logprobs
            assert choice.finish_reason == direct.finish_reason
        assert whole.usage is not None
        assert single.usage is not None
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (single.usage.prompt_tokens, 24)
        streamed = list(client.chat.completions.create(**options, seed=3, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == whole.choices[0].message.content
        text = whole.choices[0].message.content or ""
        stopped = client.chat.completions.create(**options, seed=3, stop=text[4:6]).choices[0]
        assert (stopped.message.content, stopped.finish_reason) == (text[: text.index(text[4:6])], "stop")
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(**{**options, "logit_bias": {"999999": 1}})
        assert "999999" in refused.value.message
