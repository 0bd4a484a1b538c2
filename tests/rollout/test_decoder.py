import random
from dataclasses import replace

import pytest
import torch

from alignkit.interfaces import Rollout
from alignkit.models import kernels
from alignkit.models.causal_lm import CausalPolicy
from alignkit.rollout.decoder import Decoder, Event, Request
from alignkit.rollout.engine import LocalEngine
from alignkit.rollout.filters import Filters, filtered
from alignkit.rollout.noise import noise_key
from alignkit.types import Message, Prompt, PromptRow, Sampling
from tests.fakes import ARCHITECTURES, tiny_policy

TEXTS = ["a", "the film was", "What do you think?", "longer prompts are prefilled beside shorter ones", "xyz"]


def request(policy: CausalPolicy, i: int, length: int = 12, temperature: float = 1.0) -> Request:
    ids = policy.codec.prompt(Prompt(str(i), (Message("user", TEXTS[i % len(TEXTS)]),), plain=True))
    return Request(ids, length, temperature, policy.codec.stop_ids, noise_key(7, 0, str(i), 0))


def drain(decoder: Decoder) -> dict[int, list[Event]]:
    events: dict[int, list[Event]] = {}
    while decoder.busy:
        for event in decoder.step():
            events.setdefault(event.request, []).append(event)
    return events


def alone(policy: CausalPolicy, asked: Request) -> list[Event]:
    with policy.decoding() as model:
        decoder = Decoder(model, max_rows=1)
        number = decoder.add(asked)
        return drain(decoder)[number]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_response_is_the_same_alone_and_in_a_crowd_that_comes_and_goes(architecture: str) -> None:
    policy = tiny_policy(architecture)
    asked = [request(policy, i, length=3 + 5 * (i % 4)) for i in range(12)]
    expected = [[(e.token, e.finished) for e in alone(policy, one)] for one in asked]

    order = random.Random(1)
    numbers: dict[int, int] = {}
    drawn: dict[int, list[Event]] = {}
    waiting = list(range(len(asked)))
    order.shuffle(waiting)
    cancelled = {3, 8}
    with policy.decoding() as model:
        decoder = Decoder(model, max_rows=5)
        while waiting or decoder.busy:
            for i in [waiting.pop() for _ in range(min(len(waiting), order.randrange(3)))]:
                numbers[decoder.add(asked[i])] = i
            for event in decoder.step():
                drawn.setdefault(numbers[event.request], []).append(event)
            for number, i in numbers.items():
                if i in cancelled and len(drawn.get(i, ())) >= 2:
                    decoder.cancel(number)
    for i, want in enumerate(expected):
        got = [(e.token, e.finished) for e in drawn[i]]
        assert got == want[: len(got)]
        assert len(got) == len(want) or i in cancelled


def test_each_row_obeys_its_own_length_temperature_and_stop_ids() -> None:
    policy = tiny_policy("llama")
    base = request(policy, 1, length=20)
    endless = Request(base.ids, 20, 1.0, (), base.noise_key)
    stop = alone(policy, endless)[4].token
    with policy.decoding() as model:
        decoder = Decoder(model, max_rows=8)
        short = decoder.add(Request(base.ids, 2, 1.0, (), base.noise_key))
        stopped = decoder.add(Request(base.ids, 20, 1.0, (stop,), base.noise_key))
        cold = decoder.add(Request(base.ids, 6, 1e-4, (), base.noise_key))
        events = drain(decoder)
    assert len(events[short]) == 2
    assert events[short][-1].finished == "length"
    assert events[stopped][-1].token == stop
    assert events[stopped][-1].finished == "stop"
    ids = list(base.ids)
    for event in events[cold]:
        with torch.no_grad():
            assert event.token == int(policy.module(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(event.token)


def test_samples_of_one_prompt_differ_and_a_step_done_again_is_the_same() -> None:
    policy = tiny_policy("llama")
    prompt = Prompt("p", (Message("user", "hello"),), plain=True)
    rows = [PromptRow(prompt, policy.codec.prompt(prompt))]

    def draw(step: int) -> Rollout:
        return LocalEngine(5).rollout(policy, rows, Sampling(8), samples_per_prompt=4, step=step)

    first, again, later = draw(0), draw(0), draw(1)
    assert torch.equal(first.batch.ids, again.batch.ids)
    assert torch.equal(first.logprobs, again.logprobs)
    assert not torch.equal(first.batch.ids, later.batch.ids)
    assert len({sample.response for sample in first.samples}) > 1
    assert [sample.index for sample in first.samples] == [0, 1, 2, 3]


def test_requests_come_in_as_they_came_however_long_their_prompts_are() -> None:
    policy = tiny_policy("llama")
    with policy.decoding() as model:
        decoder = Decoder(model, max_rows=1)
        numbers = [decoder.add(request(policy, i, length=1)) for i in (0, 3, 1)]
        assert [event.request for _ in numbers for event in decoder.step()] == numbers


def test_a_step_takes_in_so_many_prompt_tokens_and_one_prompt_at_least() -> None:
    policy = tiny_policy("llama")
    with policy.decoding() as model:
        decoder = Decoder(model, max_rows=8, prefill_tokens=30)
        long, *short = [decoder.add(replace(request(policy, 0, length=9), ids=tuple(range(8, 8 + n)))) for n in (40, 20, 10, 20)]
        assert [{event.request for event in decoder.step()} for _ in range(3)] == [{long}, {long, *short[:2]}, {long, *short}]


def test_a_report_gives_the_models_own_log_probabilities_whatever_was_drawn_from() -> None:
    policy = tiny_policy("llama")
    base = request(policy, 1, length=6)
    filters = Filters(top_k=3, frequency_penalty=0.5, bias=((70, 4.0),))
    asked = replace(base, temperature=0.5, filters=filters, report=2, stop_ids=())
    with policy.decoding() as model:
        decoder = Decoder(model, max_rows=4)
        plain, number = decoder.add(base), decoder.add(asked)
        events = drain(decoder)
    assert all(event.raw is None and event.likeliest == () for event in events[plain])
    ids: list[int] = list(base.ids)
    for event in events[number]:
        with torch.no_grad():
            logits = policy.module(torch.tensor([ids])).logits[0, -1]
        own = logits.log_softmax(dim=0)
        assert event.raw == pytest.approx(float(own[event.token]), abs=1e-5)
        best = own.topk(2)
        assert [token for token, _ in event.likeliest] == best.indices.tolist()
        assert [value for _, value in event.likeliest] == pytest.approx(best.values.tolist(), abs=1e-5)
        behaviour = filtered(logits[None], [filters], [0.5], [ids[len(base.ids) :]])[0].log_softmax(dim=0)
        assert event.logprob == pytest.approx(float(behaviour[event.token]), abs=1e-5)
        ids.append(event.token)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_with_the_products_of_a_server_no_bit_of_a_response_depends_on_who_else_is_there(architecture: str) -> None:
    before = kernels.chosen()
    kernels.use(kernels.for_serving())
    if kernels.chosen().decode != "packed":
        pytest.skip("this torch has no oneDNN, so that the number of rows may change the last digits")
    try:
        policy = tiny_policy(architecture)
        variants = [Filters(), Filters(top_p=0.8), Filters(top_k=5, presence_penalty=1.0), Filters(bias=((75, 3.0),))]
        asked = [
            replace(request(policy, i, length=2 + 5 * (i % 4), temperature=(1.0, 0.0, 0.7)[i % 3]), filters=variants[i % 4], report=1)
            for i in range(16)
        ]
        with policy.decoding() as model:
            expected = []
            for one in asked:
                decoder = Decoder(model, max_rows=1, together=False)
                number = decoder.add(one)
                expected.append([replace(event, request=0) for event in drain(decoder)[number]])

            order = random.Random(2)
            waiting = order.sample(range(len(asked)), len(asked))
            cancelled = {3, 8}
            decoder = Decoder(model, max_rows=5, prefill_tokens=50, together=False)
            numbers: dict[int, int] = {}
            drawn: dict[int, list[Event]] = {i: [] for i in range(len(asked))}
            while waiting or decoder.busy:
                for i in [waiting.pop() for _ in range(min(len(waiting), order.randrange(3)))]:
                    numbers[decoder.add(asked[i])] = i
                for event in decoder.step():
                    drawn[numbers[event.request]].append(replace(event, request=0))
                for number, i in numbers.items():
                    if i in cancelled and len(drawn[i]) >= 2:
                        decoder.cancel(number)
        for i, want in enumerate(expected):
            assert drawn[i] == want[: len(drawn[i])]
            assert len(drawn[i]) == len(want) or i in cancelled
    finally:
        kernels.use(before)
