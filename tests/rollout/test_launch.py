"""However a step is started, the same tokens are drawn."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from alignkit.models.attention import prepare
from alignkit.models.decoding import decoding
from alignkit.rollout import decoder as module
from alignkit.rollout.decoder import Decoder, Event, Request
from alignkit.rollout.filters import Filters
from alignkit.rollout.launch import CallByCall, Graphs, Launch, Work
from tests.fakes import tiny_policy
from tests.models.test_decoding import vivid


@pytest.fixture(params=["ahead", "recorded"])
def launch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """As on a GPU: draws are read a step later, and (where they are recorded) more rows are computed than there are."""
    made: list[Launch] = []

    def launch_on(model: Any) -> Launch:
        made.append(CallByCall(ahead=1) if request.param == "ahead" else Graphs(lambda: lambda work: work))
        return made[-1]

    monkeypatch.setattr(module, "launch_on", launch_on)
    return made


def asked() -> list[Request]:
    """Prompts and lengths of many sizes; some are stopped, some filtered, some report."""
    requests = [
        Request(tuple(range(8, 11 + 3 * (i % 5))), 1 + 4 * (i % 4), 1.0, tuple(range(80, 90 + i)) if i % 2 else (), noise_key=100 + i)
        for i in range(14)
    ]
    requests[3] = replace(requests[3], temperature=0.5, filters=Filters(top_k=4, frequency_penalty=0.8, presence_penalty=0.2))
    requests[6] = replace(requests[6], report=3)
    requests[9] = replace(requests[9], temperature=0.7, filters=Filters(top_p=0.8), report=0)
    return requests


def alone(requests: list[Request]) -> list[list[Event]]:
    found = []
    with tiny_policy("llama").decoding() as model:
        for one in requests:
            decoder = Decoder(model, max_rows=1)
            number = decoder.add(one)
            events = []
            while decoder.busy:
                events += decoder.step()
            assert {event.request for event in events} == {number}
            found.append(events)
    return found


def drawn(events: list[Event]) -> list[tuple[int, Any, bool]]:
    return [(event.token, event.finished, event.raw is None) for event in events]


def test_no_token_depends_on_how_steps_are_started(launch: list[Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    requests = asked()
    with monkeypatch.context() as plain:
        plain.setattr(module, "launch_on", lambda model: CallByCall())
        wanted = alone(requests)
    assert {events[-1].finished for events in wanted} == {"stop", "length"}

    with tiny_policy("llama").decoding() as model:
        decoder = Decoder(model, max_rows=5)
        numbers: dict[int, int] = {}
        found: dict[int, list[Event]] = {}
        waiting = list(enumerate(requests))
        while waiting or decoder.busy:
            if waiting:
                i, one = waiting.pop(0)
                numbers[decoder.add(one)] = i
            for event in decoder.step():
                found.setdefault(numbers[event.request], []).append(event)
    assert len(launch) == 1
    for i, want in enumerate(wanted):
        assert drawn(found[i]) == drawn(want)
        assert [e.logprob for e in found[i]] == pytest.approx([e.logprob for e in want], abs=1e-4)
        assert [token for e in found[i] for token, _ in e.likeliest] == [token for e in want for token, _ in e.likeliest]


def test_of_a_request_that_is_cancelled_nothing_more_is_heard(launch: list[Launch]) -> None:
    endless = [replace(one, max_new_tokens=20, stop_ids=()) for one in asked()[:3]]
    for first in (0, 1, 2):  # with its first token still on its way, or with a few read
        with tiny_policy("llama").decoding() as model:
            decoder = Decoder(model, max_rows=3)
            numbers = [decoder.add(one) for one in endless]
            for _ in range(first):
                decoder.step()
            decoder.cancel(numbers[1])
            assert decoder.rows + decoder.waiting == 2
            events = []
            while decoder.busy:
                events += decoder.step()
        assert {event.request for event in events} == {numbers[0], numbers[2]}
        assert sum(event.finished == "length" for event in events) == 2


def test_the_last_tokens_are_waited_for_when_nothing_else_is_to_be_done(launch: list[Launch]) -> None:
    with tiny_policy("llama").decoding() as model:
        decoder = Decoder(model, max_rows=1)
        decoder.add(replace(asked()[0], max_new_tokens=2, stop_ids=()))
        counts = []
        while decoder.busy:
            counts.append(len(decoder.step()))
    assert counts == [0, 1, 1]


def test_a_shape_is_recorded_the_second_time_and_forgotten_with_its_place() -> None:
    done: list[str] = []

    def record(work: Work) -> Work:
        done.append("recorded")
        return work

    def work(name: str) -> Callable[[], str]:
        def say() -> str:
            done.append(name)
            return name

        return say

    graphs = Graphs(lambda: record)
    assert [graphs("here", 4, work("a")) for _ in range(3)] == ["a", "a", "a"]
    assert done == ["a", "recorded", "a", "a"]
    graphs("here", 8, work("b"))
    graphs("there", 4, work("c"))
    assert done[4:] == ["b", "c"]
    # What was recorded is what is done, not what is handed over now.
    graphs("there", 4, work("d"))
    graphs("there", 4, work("e"))
    assert done[6:] == ["recorded", "d", "d"]


def test_rows_are_rounded_up_to_few_numbers() -> None:
    graphs = Graphs(lambda: lambda work: work)
    assert [graphs.rows(count) for count in (1, 2, 3, 4, 5, 8, 9, 100, 128)] == [1, 2, 4, 4, 8, 8, 16, 128, 128]
    assert CallByCall().rows(5) == 5


def test_what_is_computed_for_a_row_that_has_left_does_not_reach_the_one_that_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vivid("mistral")  # of whose past a token sees only the last few
    prepare(model)
    short = [Request(tuple(range(5 + i, 8 + i)), 58, 1.0, (), noise_key=i) for i in range(3)]
    long, late = Request(tuple(i % 40 + 5 for i in range(58)), 2, 1.0, (), 9), Request((5, 6, 7, 8), 20, 1.0, (), noise_key=10)

    def tokens(*before: list[Request]) -> list[tuple[int, float]]:
        with decoding(model, model.state_dict(), torch.float32) as found:
            decoder = Decoder(found, max_rows=4)
            events = []
            for requests in before:  # the long one below the short ones, whose place it leaves
                for one in requests:
                    decoder.add(one)
                events += [event for _ in range(20) for event in decoder.step()]
            number = decoder.add(late)
            while decoder.busy:
                events += decoder.step()
        return [(event.token, round(event.logprob, 3)) for event in events if event.request == number]

    wanted = tokens()
    monkeypatch.setattr(module, "launch_on", lambda model: Graphs(lambda: lambda work: work))
    assert tokens(short, [long]) == wanted
