"""More than there is room for: bounded queues, deadlines, readers that do not read, clients that go, and a server told to stop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from alignkit_serve.settings import Limits
from alignkit_serve.store import inferences
from tests.serve.fakes import ScriptedEngine, scripted
from tests.serve.running import Running, running, until


@contextmanager
def serving(tmp_path: Path, engine: ScriptedEngine, **limits: Any) -> Iterator[Running]:
    store = f"sqlite:///{tmp_path / 'store.db'}"
    with running(tmp_path / "only", store, limits=Limits(**limits), load=scripted(only=engine)) as started:
        yield started


def ask(server: Running, text: str = "one two three", **options: Any) -> dict[str, Any]:
    return {"model": "live", "messages": [{"role": "user", "content": text}], **options}


def post(server: Running, **options: Any) -> httpx.Response:
    with server.http() as client:
        return client.post("/v1/chat/completions", json=ask(server, **options))


def status_of(server: Running, id: str) -> str:
    found = server.store.read(lambda connection: inferences.get(connection, id))
    assert found is not None
    return found.status


def all_statuses(server: Running) -> list[str]:
    from sqlalchemy import select

    from alignkit_serve.store.tables import inference

    return [row[0] for row in server.store.read(lambda connection: connection.execute(select(inference.c.status)).all())]


def release(server: Running, engine: ScriptedEngine) -> None:
    """Let what is held go on."""
    assert engine.hold is not None
    server.loop.call_soon_threadsafe(engine.hold.set)


@contextmanager
def held(server: Running, engine: ScriptedEngine, count: int, **options: Any) -> Iterator[list[concurrent.futures.Future[httpx.Response]]]:
    """Within, ``count`` requests wait for their first token."""
    engine.hold = asyncio.Event()
    begun = engine.begun
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        waiting = [pool.submit(post, server, **options) for _ in range(count)]
        until(lambda: engine.begun == begun + count)
        yield waiting
        release(server, engine)


def test_more_answers_than_the_limit_are_refused_with_a_time_to_come_again(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    with serving(tmp_path, engine, queued_requests=3) as server:
        with held(server, engine, 3) as waiting:
            refused = post(server)
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "queue_full"
            assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert [one.result().status_code for one in waiting] == [200, 200, 200]
        assert post(server).status_code == 200


def test_several_answers_of_one_request_count_as_several(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    with serving(tmp_path, engine, queued_requests=3) as server:
        assert post(server, n=3).status_code == 200
        assert post(server, n=4).status_code == 429


def test_prompt_tokens_that_wait_are_bounded_too(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    with serving(tmp_path, engine, queued_tokens=7) as server, held(server, engine, 2):
        assert post(server).json()["error"]["code"] == "queue_full"


def test_the_official_client_waits_and_gets_its_answer(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    with serving(tmp_path, engine, queued_requests=1) as server, held(server, engine, 1):
        threading.Timer(0.3, release, (server, engine)).start()
        answer = server.openai(max_retries=3).chat.completions.create(model="live", messages=[{"role": "user", "content": "now?"}])
        assert answer.choices[0].message.content == "Well, yes."


def test_a_key_has_limits_of_its_own(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    with serving(tmp_path, engine) as server:
        narrow = {"Authorization": f"Bearer {server.key('infer', max_inflight=1)}"}
        slow = {"Authorization": f"Bearer {server.key('infer', rate_rpm=2)}"}

        def send(headers: dict[str, str], **options: Any) -> httpx.Response:
            return httpx.post(f"{server.url}/v1/chat/completions", json=ask(server, **options), headers=headers, trust_env=False)

        assert send(narrow).status_code == 200
        assert send(narrow, n=2).json()["error"]["code"] == "key_concurrency"
        assert [send(slow).status_code for _ in range(3)] == [200, 200, 429]
        assert send(narrow).status_code == 200


def test_a_first_token_that_does_not_come_is_given_up(tmp_path: Path) -> None:
    engine = ScriptedEngine(hold=None, pause=5)
    with serving(tmp_path, engine, first_token_seconds=0.2) as server:
        for stream in (False, True):
            late = post(server, stream=stream)
            assert late.status_code == 504
            assert late.json()["error"]["code"] == "deadline_exceeded"
            assert late.headers["x-should-retry"] == "false"
        assert engine.cancelled == 2
        assert all_statuses(server) == ["error", "error"]


def test_an_answer_that_takes_too_long_ends_in_its_stream(tmp_path: Path) -> None:
    engine = ScriptedEngine(words=("word ",) * 100, pause=0.05)
    with serving(tmp_path, engine, total_seconds=0.4) as server:
        stream = server.openai().chat.completions.create(model="live", messages=[{"role": "user", "content": "go on"}], stream=True)
        with pytest.raises(openai.APIError) as late:
            list(stream)
        assert late.value.code == "deadline_exceeded"
        until(lambda: engine.cancelled == 1)


def test_an_engine_that_breaks_says_so_before_and_within_a_stream(tmp_path: Path) -> None:
    engine = ScriptedEngine(fails_after=0)
    with serving(tmp_path, engine) as server:
        broken = post(server, stream=True)
        assert (broken.status_code, broken.json()["error"]["code"]) == (503, "engine_unavailable")
        assert "a cable is loose" in broken.json()["error"]["message"]
        engine.fails_after = 2
        lines = post(server, stream=True).text
        assert '"code":"engine_unavailable"' in lines
        assert lines.endswith("data: [DONE]\n\n")
        assert all_statuses(server) == ["error", "error"]


def test_where_one_answer_breaks_the_others_of_its_request_end_with_it(tmp_path: Path) -> None:
    engine = ScriptedEngine(words=("word ",) * 1000, pause=0.005, fails_after=3, failing=1)
    with serving(tmp_path, engine) as server:
        assert post(server, n=3).json()["error"]["code"] == "engine_unavailable"
        until(lambda: server.service.admission.answers == 0)
        assert (engine.begun, engine.cancelled) == (3, 3)


def test_a_client_that_goes_before_the_first_token_frees_its_place(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    with serving(tmp_path, engine) as server:
        engine.hold = asyncio.Event()
        with pytest.raises(httpx.ReadTimeout), server.http() as client:
            client.post("/v1/chat/completions", json=ask(server, stream=True), timeout=0.3)
        until(lambda: engine.cancelled == 1 and server.service.admission.answers == 0)


def leave_after_the_first_bytes(server: Running) -> None:
    with server.http() as client, client.stream("POST", "/v1/chat/completions", json=ask(server, stream=True)) as response:
        next(response.iter_raw())


def test_a_client_that_goes_frees_its_place_streaming_or_not(tmp_path: Path) -> None:
    engine = ScriptedEngine(words=("word ",) * 1000, pause=0.01)
    with serving(tmp_path, engine) as server:
        with pytest.raises(httpx.ReadTimeout), server.http() as client:
            client.post("/v1/chat/completions", json=ask(server), timeout=0.3)
        leave_after_the_first_bytes(server)
        until(lambda: engine.cancelled == 2 and server.service.admission.answers == 0)
        assert all_statuses(server) == ["cancelled", "cancelled"]


def test_a_reader_that_does_not_read_is_cut_off(tmp_path: Path) -> None:
    engine = ScriptedEngine(words=("x" * 50_000,) * 2000)
    with serving(tmp_path, engine, write_seconds=0.5) as server:
        body = httpx.Request("POST", server.url, json=ask(server, stream=True)).content
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key('infer')}\r\n"
            connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: engine.cancelled == 1)
            until(lambda: server.service.admission.answers == 0)
        assert all_statuses(server) == ["error"]


def test_a_server_told_to_stop_finishes_what_it_began_and_takes_nothing_new(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    with serving(tmp_path, engine) as server, held(server, engine, 1) as waiting:
        draining = asyncio.run_coroutine_threadsafe(server.service.drain(), server.loop)
        until(lambda: server.service.admission.draining)
        refused = post(server)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["retry-after"] == "5"
        assert httpx.get(f"{server.url}/ready", trust_env=False).status_code == 503
        assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 200
        assert not draining.done()
        release(server, engine)
        assert waiting[0].result().status_code == 200
        draining.result(10)


def test_what_does_not_finish_in_time_is_told_and_stored(tmp_path: Path) -> None:
    engine = ScriptedEngine(words=("word ",) * 1000, pause=0.01)
    with serving(tmp_path, engine, drain_seconds=0.2) as server:
        stream = server.openai().chat.completions.create(model="live", messages=[{"role": "user", "content": "go on"}], stream=True)
        first = next(iter(stream))
        draining = asyncio.run_coroutine_threadsafe(server.service.drain(), server.loop)
        with pytest.raises(openai.APIError) as told:
            list(stream)
        assert told.value.code == "draining"
        draining.result(10)
        assert status_of(server, first.id) == "cancelled"


def test_pings_keep_a_silent_stream_open(tmp_path: Path) -> None:
    engine = ScriptedEngine(words=("a", "b"), pause=0.25)
    with serving(tmp_path, engine, ping_seconds=0.1) as server:
        text = post(server, stream=True).text
        assert ": ping\n\n" in text
        answer = server.openai().chat.completions.create(model="live", messages=[{"role": "user", "content": "?"}], stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in answer) == "ab"


def test_cancelled_requests_leave_nothing_behind(tmp_path: Path) -> None:
    """In small; ten thousand are `python -m benchmarks.serving --cancels 10000`."""
    engine = ScriptedEngine(words=("word ",) * 1000, pause=0.001)
    with serving(tmp_path, engine) as server:

        def objects_after(cancelled: int) -> int:
            for _ in range(cancelled):
                leave_after_the_first_bytes(server)
            until(lambda: server.service.admission.answers == 0 and not server.service.answers)
            time.sleep(0.2)
            gc.collect()
            return sum(str(type(each).__module__).startswith("alignkit_serve") for each in gc.get_objects())

        assert objects_after(50) <= objects_after(5) + 5
        assert engine.begun == engine.cancelled + engine.finished


def test_a_server_whose_engine_has_stopped_is_not_ready(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    with serving(tmp_path, engine) as server:
        assert httpx.get(f"{server.url}/ready", trust_env=False).status_code == 200
        engine.broken = "the engine has stopped: a cable is loose"
        told = httpx.get(f"{server.url}/ready", trust_env=False)
        assert (told.status_code, told.json()["error"]["message"]) == (503, engine.broken)
