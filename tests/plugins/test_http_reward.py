"""The HTTP reward against a real process that is slow, broken, rude or dead. Waits between requests pass on a clock of the test's own."""

from __future__ import annotations

import asyncio
import json
import random
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema_rs
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st

from alignkit.api import Answer, Message, Prompt, RewardSource, RunError, Sample, SettingError, Unavailable
from alignkit.testing import RewardSourceConformance, example_samples
from alignkit_http_reward import HTTPConfig, register_rewards
from alignkit_http_reward.client import Time
from alignkit_http_reward.patience import Breaker, backoff, retry_after
from alignkit_http_reward.source import HTTPReward, key_of
from alignkit_http_reward.wire import REQUEST_SCHEMA, RESPONSE_SCHEMA, Garbled, WrongAnswer, read_scores, request_body
from tests.plugins.reward_service import RewardService, reward_service
from tests.serve.running import until
from tests.test_docs import blocks

TWO = [{"value": 1.0}, {"value": 2.0}]


class Hours:
    """A clock that sleeping moves on, so that minutes of waiting take no time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.then: Any = lambda: None

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.then()
        await asyncio.sleep(0)

    def time(self) -> Time:
        return Time(self.clock, self.sleep, random.Random(0))


def samples(count: int) -> list[Sample]:
    return [Sample(Prompt(f"p{i}", (Message("user", f"Question {i}?"),), metadata={"topic": i}), "x" * i) for i in range(count)]


def source(url: str, hours: Hours | None = None, *, key: str | None = None, said: list[str] | None = None, **settings: Any) -> HTTPReward:
    return HTTPReward(HTTPConfig(url=url, **settings), key, (said if said is not None else []).append, (hours or Hours()).time())


def collect(answers: Iterator[Sequence[Answer]], into: list[Answer]) -> None:
    for batch in answers:
        into += batch


def values(reward: HTTPReward, count: int) -> list[float | None]:
    return [score.value for score in reward.score(samples(count))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "service"


def test_scores_come_back_in_order_from_batches_asked_side_by_side(folder: Path) -> None:
    with reward_service(folder, replies=[{"sleep": 0.2}]) as service:
        scores = source(service.url, key="secret", batch=4, concurrency=3).score(samples(10))
        assert [score.value for score in scores] == [float(i) for i in range(10)]
        assert scores[3].parts == {"length": 3.0}
        assert sorted(len(ids) for ids in service.noted("asked")) == [2, 4, 4]
        assert set(service.noted("key")) == {"Bearer secret"}
        for body in service.noted("body"):
            assert jsonschema_rs.validator_for(dict(REQUEST_SCHEMA)).is_valid(body)
        sent = {sample["id"]: sample for body in service.noted("body") for sample in body["samples"]}
        assert sent["p2/0"] == {
            "id": "p2/0",
            "prompt": [{"role": "user", "content": "Question 2?"}],
            "response": "xx",
            "finished": True,
            "metadata": {"topic": 2},
        }


@pytest.mark.parametrize(
    ("reply", "waited"),
    [
        ({"status": 500}, 0.25),
        ({"status": 503, "headers": {"Retry-After": "40"}}, 40.0),
        ({"status": 429, "headers": {"Retry-After": "7"}}, 7.0),
        ({"status": 408}, 0.25),
        ({"status": 425}, 0.25),
        ({"body": "<html>gateway</html>"}, 0.25),
        ({"repeat": ["[", 50_000]}, 0.25),
        ({"drop": True}, 0.25),
        ({"half": True}, 0.25),
        ({"sleep": 5.0}, 0.25),
    ],
    ids=str,
)
def test_what_may_pass_is_asked_again(folder: Path, reply: dict[str, Any], waited: float) -> None:
    hours = Hours()
    with reward_service(folder, replies=[reply]) as service:
        assert values(source(service.url, hours, timeout_seconds=0.5), 2) == [0.0, 1.0]
        assert len(service.noted("asked")) == 2
    assert waited <= hours.now <= max(0.5, waited)


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ({"body": json.dumps({"scores": TWO[:1]})}, "answered 1 scores for 2 samples; one each is needed, in the same order"),
        ({"body": json.dumps({"scores": [*TWO, *TWO]})}, "answered 4 scores for 2 samples"),
        ({"body": '{"scores": [{"value": 1.0}, {"value": NaN}]}'}, r"answered NaN as scores\[1\]\.value; allowed: a finite number or null"),
        ({"body": '{"scores": [{"value": 1e999}, {"value": 1}]}'}, r"answered Infinity as scores\[0\]\.value"),
        ({"body": '{"scores": [{"value": true}, {"value": 1}]}'}, r"answered true as scores\[0\]\.value"),
        ({"body": '{"scores": [{"value": "good"}, {"value": 1}]}'}, r'answered "good" as scores\[0\]\.value'),
        ({"body": '{"scores": [1, 2]}'}, r"answered 1 as scores\[0\]; needed: a mapping with a `value`"),
        ({"body": '{"scores": [{"value": 1, "parts": {"a": null}}, {"value": 1}]}'}, r"answered null as scores\[0\]\.parts\.a"),
        ({"body": '{"scores": [{"value": 1, "parts": {"a/b": 1}}, {"value": 1}]}'}, r'a part named "a/b"'),
        ({"body": '{"rewards": [1, 2]}'}, r'answered {"rewards": \[1, 2\]}; needed: {"scores": \[...\]}'),
        ({"repeat": ["[", 200_000]}, "answered more than 131072 bytes for 2 samples"),
        ({"status": 400, "body": "no such\nmodel"}, "answered 400 Bad Request: no such model"),
        ({"status": 404}, "answered 404 Not Found"),
        ({"status": 401, "body": "who?"}, r"answered 401 Unauthorized: who\?; is key_env set as it should be\?"),
        ({"status": 302, "headers": {"Location": "http://elsewhere.invalid/"}}, r"302 Found, a redirect to http://elsewhere\.invalid/"),
    ],
    ids=str,
)
def test_what_would_be_the_same_again_ends_the_run_at_once(folder: Path, reply: dict[str, Any], says: str) -> None:
    hours = Hours()
    with reward_service(folder, replies=[reply]) as service:
        with pytest.raises(RunError, match=rf"the reward service {service.url} .*{says}"):
            source(service.url, hours).score(samples(2))
        assert len(service.noted("asked")) == 1
    assert hours.now == 0.0


def test_no_verdict_is_an_answer_and_says_why(folder: Path) -> None:
    body = json.dumps({"scores": [{"value": None, "reason": "not English"}, {"value": None}]})
    with reward_service(folder, replies=[{"body": body}]) as service:
        [answers] = source(service.url).answers(samples(2))
    assert [(answer.score.value, answer.score.reason, answer.answered) for answer in answers] == [
        (None, "not English", True),
        (None, "the service has no verdict", True),
    ]


def test_a_service_that_dies_and_comes_back_is_asked_on(folder: Path) -> None:
    hours, said = Hours(), list[str]()
    with reward_service(folder, replies=[{}, {"exit": True}]) as service:

        def rise() -> None:
            if hours.now > 20.0 and service.process is not None and service.process.poll() is not None:
                service.start()

        hours.then = rise
        assert values(source(service.url, hours, said=said, batch=2, concurrency=1, breaker_failures=3), 8) == [float(i) for i in range(8)]
    assert [f"{service.url} failed 3 times in a row" in line for line in said] == [True]
    assert 20.0 < hours.now < 60.0


def test_a_sample_without_an_answer_is_masked_while_there_are_few(folder: Path) -> None:
    hours, said = Hours(), list[str]()
    with reward_service(folder, poison=["p7/0"]) as service:
        scores = source(service.url, hours, said=said, batch=5).score(samples(50))
    assert [i for i, score in enumerate(scores) if score.value is None] == [5, 6, 7, 8, 9]
    assert scores[5].reason is not None
    assert scores[5].reason.startswith(f"{service.url}: ")
    assert scores[5].reason.endswith("the last: 500 Internal Server Error")
    assert 500.0 < hours.now <= 600.0
    assert any("5 samples have no score" in line for line in said)


def test_too_many_of_them_stop_the_run_and_what_was_answered_is_passed_on_first(folder: Path) -> None:
    arrived: list[Answer] = []
    with reward_service(folder, poison=["p7/0", "p21/0"]) as service:
        reward = source(service.url, batch=5)
        with pytest.raises(
            Unavailable, match=rf"{service.url} left 10 of the last 50 samples without a score \(max_failed_share: 0.1\)"
        ) as away:
            collect(reward.answers(samples(50)), arrived)
    assert away.value.exit_code == 75
    assert sum(answer.answered for answer in arrived) == 40


def test_a_budget_is_one_of_the_last_thousand_samples(folder: Path) -> None:
    with reward_service(folder, poison=["p7/0"]) as service:
        reward = source(service.url, batch=10, max_failed_share=0.015)
        assert None not in [score.value for score in reward.score(samples(1010)[10:])]
        assert values(reward, 30).count(None) == 10  # 15 are allowed
        with pytest.raises(Unavailable, match="left 20 of the last 1000 samples"):
            values(reward, 30)


def test_a_step_of_which_nothing_was_answered_stops_the_run(folder: Path) -> None:
    with reward_service(folder, poison=["p0/0"]) as service:
        reward = source(service.url, max_failed_share=0.9)
        reward.score(samples(500)[1:])
        with pytest.raises(Unavailable, match="left 2 of the last 501 samples without a score"):
            reward.score(samples(2))


def test_a_dead_service_is_not_hammered_and_is_waited_for_once(folder: Path) -> None:
    hours, said = Hours(), list[str]()
    with reward_service(folder) as service:
        service.kill()
        reward = source(service.url, hours, said=said, batch=2, max_failed_share=0.5, cooldown_seconds=60.0)
        with pytest.raises(Unavailable, match="All connection attempts failed"):
            reward.score(samples(40))
        service.start()
    assert 540.0 < hours.now <= 600.0
    assert sum("waiting" in line for line in said) == 1


def test_a_long_retry_after_is_not_waited_for_in_vain(folder: Path) -> None:
    hours = Hours()
    reply = {"status": 503, "headers": {"Retry-After": "86400"}}
    with reward_service(folder, replies=[reply] * 9) as service, pytest.raises(Unavailable, match="1 request in 0 s, the last: 503"):
        source(service.url, hours, concurrency=1).score(samples(4))
    assert hours.now == 0.0


def test_an_unusable_answer_waits_for_those_on_their_way(folder: Path) -> None:
    arrived: list[Answer] = []
    with reward_service(folder, replies=[{"sleep": 0.5}, {"status": 400}]) as service:
        with pytest.raises(RunError, match="answered 400"):
            collect(source(service.url, batch=2, concurrency=2).answers(samples(20)), arrived)
        assert len(service.noted("asked")) == 2
    assert len(arrived) == 2


def test_whoever_stops_listening_ends_the_requests(folder: Path) -> None:
    with reward_service(folder, replies=[{}, {"sleep": 60.0}]) as service:
        answers = source(service.url, batch=1, concurrency=2).answers(samples(2))
        assert len(next(answers)) == 1
        answers.close()  # what a Ctrl-C comes to; it does not wait for the minute
    assert [thread for thread in threading.enumerate() if "portal" in thread.name] == []


def test_proxies_of_the_environment_are_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with reward_service(folder) as service:
        assert values(source(service.url), 3) == [0.0, 1.0, 2.0]


def test_it_works_where_a_loop_is_running_already(folder: Path) -> None:
    async def notebook() -> list[float | None]:
        return values(source(service.url), 3)

    with reward_service(folder) as service:
        assert asyncio.run(notebook()) == [0.0, 1.0, 2.0]


def test_the_chance_of_waiting_leaves_the_global_generator_alone(folder: Path) -> None:
    random.seed(5)
    before = random.getstate()
    with reward_service(folder, replies=[{"status": 500}] * 2) as service:
        values(source(service.url), 2)
    assert random.getstate() == before


def test_any_text_can_be_sent_and_metadata_that_is_not_json_is_named() -> None:
    odd = Sample(Prompt("p", (Message("user", "half \ud800"),), origin="data/p.jsonl:3"), "a \ud83d b")
    assert json.loads(request_body([odd]))["samples"][0]["response"] == "a \ud83d b"
    wrong = Sample(Prompt("p", (Message("user", "?"),), metadata={"weight": float("nan")}, origin="data/p.jsonl:3"), "a")
    with pytest.raises(RunError, match=r"data/p\.jsonl:3: the prompt's other columns cannot be sent"):
        request_body([wrong])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["scores", "value", "parts", "reason", "a"]), inner, max_size=3)
    ),
)


@given(JSON, st.integers(0, 3))
def test_whatever_comes_is_read_as_scores_or_refused(answer: Any, count: int) -> None:
    try:
        scores = read_scores(json.dumps(answer).encode(), count)
    except (WrongAnswer, Garbled):
        return
    assert len(scores) == count
    assert jsonschema_rs.validator_for(dict(RESPONSE_SCHEMA)).is_valid(answer) or any("parts" in each for each in answer["scores"])


@given(st.binary(max_size=30))
def test_whatever_bytes_come_are_refused(body: bytes) -> None:
    with pytest.raises((WrongAnswer, Garbled)):
        read_scores(body, 1)


def test_waits_double_up_to_half_a_minute_and_differ() -> None:
    draw = random.Random(3)
    for failures, most in ((1, 0.5), (2, 1.0), (3, 2.0), (7, 30.0), (1000, 30.0)):
        waits = {backoff(failures, draw) for _ in range(20)}
        assert all(most / 2 <= wait <= most for wait in waits)
        assert len(waits) == 20


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0.0), ("12", 12.0), (" 3 ", 3.0), ("soon", 0.0), ("-4", 0.0), ("", 0.0),
        ("Thu, 26 Nov 2026 12:00:30 GMT", 30.0), ("Thu, 26 Nov 2026 11:00:00 GMT", 0.0), ("Thu, 26 Nov 2026 12:00:30", 30.0),
    ],
)  # fmt: skip
def test_retry_after_is_seconds_or_a_date(header: str | None, seconds: float) -> None:
    assert retry_after(header, datetime(2026, 11, 26, 12, tzinfo=UTC)) == seconds


def test_a_breaker_lets_one_try_after_each_cooldown() -> None:
    hours = Hours()
    breaker = Breaker(2, 10.0, hours.clock)
    assert [breaker.failed("a"), breaker.wait(), breaker.failed("b"), breaker.wait(), breaker.failed("c")] == [
        False,
        0.0,
        True,
        10.0,
        False,
    ]
    hours.now = 10.0
    assert [breaker.wait(), breaker.wait()] == [0.0, 10.0]  # one tries, the next waits
    hours.now = 12.0
    breaker.succeeded()
    assert [breaker.wait(), breaker.wait()] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"url": "ftp://host/x"}, 'url: is "ftp://host/x"; allowed: http://HOST:PORT/PATH or https://HOST/PATH'),
        ({"url": "localhost:9000"}, 'url: is "localhost:9000"'),
        ({"url": "http:///score"}, "allowed"),
        ({"url": "http://host:port/"}, "url: is not an address"),
        ({"url": "http://[::1/"}, "url: is not an address"),
        ({"url": "http://host/a b"}, "allowed"),
        ({"url": "http://me:secret@host/"}, "url: holds a name or a password; put the key into an environment variable"),
        ({"url": "http://host/", "timeout_seconds": 900.0}, "timeout_seconds: is 900, longer than deadline_seconds, 600; lower it"),
        ({"url": "http://host/", "cooldown_seconds": 900.0}, "cooldown_seconds: is 900"),
        ({"url": "http://host/", "key_env": "sk-1234"}, "key_env: is not the name of an environment variable"),
    ],
)
def test_mistakes_in_the_config_are_told(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingError) as error:
        HTTPConfig(**settings)
    assert says in str(error.value)
    assert "secret" not in str(error.value)
    assert "1234" not in str(error.value)


def test_the_key_comes_from_the_environment_and_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_KEY", "abc")
    assert key_of("REWARD_KEY") == "abc"
    assert key_of(None) is None
    monkeypatch.setenv("REWARD_KEY", "abc\n")
    with pytest.raises(RunError, match="holds a blank, a line break") as error:
        key_of("REWARD_KEY")
    assert "abc" not in str(error.value)
    monkeypatch.delenv("REWARD_KEY")
    with pytest.raises(RunError, match="REWARD_KEY, which is not set; export it"):
        key_of("REWARD_KEY")


def test_the_service_in_the_documentation_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = Path(__file__).parents[2] / "docs" / "http-reward.md"
    module = ModuleType("documented_service")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    [code] = [block.code for block in blocks(document) if block.language == "python"]
    exec(compile(code, str(document), "exec"), vars(module))
    with listening(vars(module)["app"]) as url:
        scores = source(f"{url}/score", batch=2).score([replace(sample, response="one two") for sample in samples(3)] + samples(1))
    assert [score.value for score in scores] == [0.8, 0.8, 0.8, None]
    assert (scores[0].parts, scores[3].reason) == ({"short": -0.2, "finished": 1.0}, "there is nothing to judge")


def test_the_examples_in_the_documentation_fit_the_schemas() -> None:
    text = (Path(__file__).parents[2] / "docs" / "http-reward.md").read_text()
    request, answer = (json.loads(found) for found in re.findall(r"^```json\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    jsonschema_rs.validate(dict(REQUEST_SCHEMA), request)
    jsonschema_rs.validate(dict(RESPONSE_SCHEMA), answer)
    assert [score.value for score in read_scores(json.dumps(answer).encode(), 2)] == [0.8, None]


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """Within, the app on a free port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)


class TestConformance(RewardSourceConformance):
    spec = register_rewards()[0]
    config = HTTPConfig(url="http://127.0.0.1:9/score", batch=3, key_env=None)
    wrong = ({"url": "gopher://x"}, {"batch": 0}, {"max_failed_share": 1.0}, {"key_env": "not a name"}, {"timeout_seconds": 1e6})
    service: RewardService

    @pytest.fixture(autouse=True)
    def _served(self, folder: Path) -> Iterator[None]:
        with reward_service(folder) as self.service:
            yield

    def build(self, folder: Path) -> RewardSource:
        return source(self.service.url, batch=3)


def test_every_awkward_sample_is_scored(folder: Path) -> None:
    with reward_service(folder) as service:
        scores = source(service.url).score(example_samples())
    assert [score.value for score in scores] == [float(len(sample.response)) for sample in example_samples()]
