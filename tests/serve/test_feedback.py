"""Feedback over HTTP: what gets a 2xx is checked and stored, who speaks is nobody's claim, and what others said is nobody's business."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from sqlalchemy import func, select

from alignkit_serve.desk import Desk
from alignkit_serve.passes import Pass, read
from alignkit_serve.scribe import Scribe
from alignkit_serve.settings import Limits
from alignkit_serve.store import Store, StoreError, keys, new_id
from alignkit_serve.store.feedback import Opinion
from alignkit_serve.store.secrets import secret
from alignkit_serve.store.tables import feedback
from tests.serve.fakes import ScriptedEngine, scripted
from tests.serve.running import Running, running
from tests.serve.store.test_feedback import a_thumb, one_answer

ASK = {"model": "live", "messages": [{"role": "user", "content": "Hello?"}]}
ALL = ("infer", "feedback:write", "feedback:read")


@pytest.fixture
def server(database_url: str, tmp_path: Path) -> Iterator[Running]:
    limits = Limits(feedback_per_target_rpm=10_000)
    with running(tmp_path / "only", database_url, limits=limits, load=scripted(only=ScriptedEngine())) as started:
        yield started


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.http(*ALL) as client:
        yield client


def answer(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/chat/completions", json={**ASK, **fields})
    assert response.status_code == 200, response.text
    return dict(response.json())


def completions(answered: dict[str, Any]) -> list[str]:
    return [choice["alignkit"]["completion_id"] for choice in answered["choices"]]


def thumb(target: str, **fields: Any) -> dict[str, Any]:
    return {"kind": "thumb", "target_type": "completion", "target_id": target, "value": "up", **fields}


def post(client: httpx.Client, body: Any, key: str | None = None, **headers: str) -> httpx.Response:
    return client.post("/v1/feedback", json=body, headers={**({"Idempotency-Key": key} if key else {}), **headers})


def said(client: httpx.Client, body: Any, key: str | None = None) -> dict[str, Any]:
    response = post(client, body, key)
    assert response.status_code == 201, response.text
    return dict(response.json())


def refused(response: httpx.Response) -> tuple[int, str, str | None]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["code"], error["param"]


def rows(server: Running) -> int:
    return server.store.read(lambda connection: connection.scalar(select(func.count()).select_from(feedback))) or 0


def test_every_kind_is_taken_and_found_again(server: Running, client: httpx.Client) -> None:
    answered = answer(client, n=3, alignkit={"episode_id": "talk-1"})
    a, b, c = completions(answered)
    inference, group = answered["id"], answered["alignkit"]["group_id"]
    with server.http("admin") as admin:
        metric = admin.post("/v1/feedback/metrics", json={"name": "clear", "type": "likert", "level": "inference", "lo": 1, "hi": 5})
        again = admin.post("/v1/feedback/metrics", json={"name": "clear", "type": "likert", "level": "inference", "lo": 1, "hi": 5})
    assert (metric.status_code, again.status_code, metric.json()) == (201, 200, again.json())
    on_inference = {"target_type": "inference", "target_id": inference}
    on_group = {"target_type": "group", "target_id": group}
    sent = [
        thumb(a, rationale="true", presentation={"slots": [a], "dwell_ms": 900}, occurred_at="2026-02-03T04:05:06+01:00"),
        {"kind": "rating", **on_inference, "value": 7},
        {"kind": "metric", "metric": "clear", "version": 1, **on_inference, "value": 4},
        {"kind": "preference", **on_group, "value": {"a": a, "b": b, "choice": "a", "strength": 3}},
        {"kind": "preference", **on_inference, "value": {"a": c, "b": b, "choice": "both_bad"}},
        {"kind": "ranking", **on_group, "value": [[b], [a, c]]},
        {"kind": "correction", "target_type": "completion", "target_id": b, "value": "No."},
        {"kind": "demonstration", **on_inference, "value": "Hello!"},
        {"kind": "comment", "target_type": "episode", "target_id": "talk-1", "value": "Long."},
        {"kind": "flag", "target_type": "completion", "target_id": c, "value": "hallucination"},
    ]
    given = [said(client, body) for body in sent]
    for body, row in zip(sent, given, strict=True):
        assert row["value"] == body["value"]
        assert (row["object"], row["state"], row["source"]) == ("feedback", "active", "api")
        found = client.get(f"/v1/feedback/{row['id']}").json()
        assert found == {**row, "history": [row]}
    assert given[0]["occurred_at"] == "2026-02-03T03:05:06+00:00"
    assert given[0]["presentation"] == {"slots": [a], "dwell_ms": 900}
    assert given[2]["metric_id"] == metric.json()["id"] == client.get("/v1/feedback/metrics").json()["data"][0]["id"]
    listing = client.get("/v1/feedback", params={"limit": 4}).json()
    assert (listing["data"], listing["has_more"], listing["last_id"]) == (given[:4], True, given[3]["id"])
    rest = client.get("/v1/feedback", params={"after": listing["last_id"], "limit": 100}).json()
    assert (rest["data"], rest["has_more"]) == (given[4:], False)
    of_group = client.get("/v1/feedback", params={"target": group, "kind": "ranking"}).json()["data"]
    assert of_group == [given[5]]


def without(body: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key != name}


PAIR = {"kind": "preference", "target_type": "inference", "target_id": "x"}
RANKING = {**PAIR, "kind": "ranking"}
TEXT = {"kind": "comment", "target_type": "completion", "target_id": "x"}
WRONG: dict[str, tuple[Any, str | None]] = {
    "no kind": (without(thumb("x"), "kind"), None),
    "a kind of nobody's": (thumb("x", kind="like"), None),
    "no target": (without(thumb("x"), "target_id"), "target_id"),
    "no value": (without(thumb("x"), "value"), "value"),
    "a list": ([thumb("x")], None),
    "a thumb sideways": (thumb("x", value="left"), "value"),
    "a thumb on a group": (thumb("x", target_type="group"), "target_type"),
    "a rating of 8": (thumb("x", kind="rating", value=8), "value"),
    "a rating of 0": (thumb("x", kind="rating", value=0), "value"),
    "a rating in words": (thumb("x", kind="rating", value="7"), "value"),
    "a rating of true": (thumb("x", kind="rating", value=True), "value"),
    "half a rating": (thumb("x", kind="rating", value=6.5), "value"),
    "a metric without a name": (thumb("x", kind="metric", value=1), "metric"),
    "a metric of a list": (thumb("x", kind="metric", metric="m", value=[1]), "value"),
    "a comparison with itself": ({**PAIR, "value": {"a": "1", "b": "1", "choice": "a"}}, "value"),
    "a tie with a strength": ({**PAIR, "value": {"a": "1", "b": "2", "choice": "tie", "strength": 1}}, "value"),
    "a strength of 4": ({**PAIR, "value": {"a": "1", "b": "2", "choice": "a", "strength": 4}}, "value.strength"),
    "a comparison with a third": ({**PAIR, "value": {"a": "1", "b": "2", "c": "3", "choice": "a"}}, "value.c"),
    "a ranking of one": ({**RANKING, "value": [["1"]]}, "value"),
    "a ranking of ten": ({**RANKING, "value": [[str(i)] for i in range(10)]}, "value"),
    "a ranking of ten in ties": ({**RANKING, "value": [["1", "2", "3", "4", "5"], ["6", "7", "8", "9", "10"]]}, "value"),
    "a ranking of one twice": ({**RANKING, "value": [["1"], ["2", "1"]]}, "value"),
    "a ranking with an empty place": ({**RANKING, "value": [["1"], [], ["2"]]}, "value[1]"),
    "a correction of an inference": ({**TEXT, "kind": "correction", "target_type": "inference", "value": "a"}, "target_type"),
    "an empty correction": ({**TEXT, "kind": "correction", "value": ""}, "value"),
    "a correction of spaces": ({**TEXT, "kind": "correction", "value": " \n\t"}, "value"),
    "an empty demonstration": ({**TEXT, "kind": "demonstration", "target_type": "inference", "value": " "}, "value"),
    "a comment that is too long": ({**TEXT, "value": "a" * 10_001}, "value"),
    "half a surrogate pair": ({**TEXT, "value": "\ud83d"}, "value"),
    "a flag of nobody's": ({**TEXT, "kind": "flag", "value": "boring"}, "value"),
    "a time without a zone": (thumb("x", occurred_at="2026-02-03T04:05:06"), "occurred_at"),
    "a time to come": (thumb("x", occurred_at="2099-02-03T04:05:06Z"), "occurred_at"),
    "a time before time": (thumb("x", occurred_at="0001-01-01T00:00:00+14:00"), "occurred_at"),
    "a presentation of more": (thumb("x", presentation={"screen": "wide"}), "presentation.screen"),
    "a rationale that is too long": (thumb("x", rationale="a" * 10_001), "rationale"),
}


def test_what_is_wrong_is_named_and_not_stored(server: Running, client: httpx.Client) -> None:
    for what, (body, param) in WRONG.items():
        response = client.post("/v1/feedback", content=json.dumps(body), headers={"Content-Type": "application/json"})
        assert refused(response) == (400, "invalid_request", param), (what, response.text)
    assert rows(server) == 0


FORGED = (
    *("annotator_id", "annotator", "author", "user", "user_id", "api_key_id", "source", "weight", "is_admin", "state", "reason"),
    *("id", "first_id", "supersedes_id", "idem_key", "idempotency_key", "body_sha256", "received_at", "inference_id", "metric_id"),
)


def test_who_speaks_is_not_taken_from_what_is_said(server: Running, client: httpx.Client) -> None:
    (completion,) = completions(answer(client))
    mine = said(client, thumb(completion))
    with server.http("feedback:write") as other:
        for name in FORGED:
            forged = {name: mine.get(name) or "x"}
            assert refused(post(other, thumb(completion, **forged))) == (400, "invalid_request", name)
            assert refused(other.patch(f"/v1/feedback/{mine['id']}", json={"kind": "thumb", "value": "down", **forged}))[2] == name
            item = {"items": [{**thumb(completion), "idempotency_key": "k", **forged}]}
            if name != "idempotency_key":
                (result,) = other.post("/v1/feedback:batch", json=item).json()["data"]
                assert (result["status"], result["error"]["param"]) == (400, name)
        honest = said(other, thumb(completion))
    assert honest["annotator_id"] != mine["annotator_id"]
    assert rows(server) == 2


def test_the_same_key_says_it_once_and_nothing_else(server: Running, client: httpx.Client) -> None:
    (completion,) = completions(answer(client))
    first = post(client, thumb(completion), "k")
    again = [post(client, thumb(completion), "k") for _ in range(3)]
    assert [response.status_code for response in (first, *again)] == [201, 200, 200, 200]
    assert {response.json()["id"] for response in (first, *again)} == {first.json()["id"]}
    assert refused(post(client, thumb(completion, value="down"), "k")) == (409, "idempotency_conflict", "Idempotency-Key")
    # In another order and with other spaces it is the same.
    backwards = json.dumps(dict(reversed(thumb(completion).items())), indent=3)
    headers = {"Idempotency-Key": "k", "Content-Type": "application/json"}
    assert client.post("/v1/feedback", content=backwards, headers=headers).json() == first.json()
    with server.http("feedback:write") as other:
        assert post(other, thumb(completion, value="down"), "k").status_code == 201
    assert refused(post(client, thumb(completion), "k" * 256))[2] == "Idempotency-Key"
    assert rows(server) == 2


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(posts=st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), min_size=1, max_size=40))
def test_whatever_is_sent_again_and_at_once_there_is_one_row_and_one_id_a_key(
    server: Running, client: httpx.Client, posts: list[tuple[str, bool]]
) -> None:
    (completion,) = completions(answer(client))
    before, round = rows(server), new_id("")

    def send(one: tuple[str, bool]) -> str:
        key, in_batch = one
        if in_batch:
            item = {**thumb(completion), "idempotency_key": round + key}
            return str(client.post("/v1/feedback:batch", json={"items": [item]}).json()["data"][0]["feedback"]["id"])
        return str(post(client, thumb(completion), round + key).json()["id"])

    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(send, posts))
    of_key = {(key, id) for (key, _), id in zip(posts, ids, strict=True)}
    assert len(of_key) == len({key for key, _ in posts}) == len(set(ids)) == rows(server) - before


def test_a_batch_stores_what_it_can_and_tells_of_each(server: Running, client: httpx.Client) -> None:
    a, b = completions(answer(client, n=2))
    items: list[dict[str, Any]] = [
        {**thumb(a), "idempotency_key": "1"},
        {**thumb(b, value="left"), "idempotency_key": "2"},
        {**thumb("cmp-none"), "idempotency_key": "3"},
        thumb(a),
        {**thumb(a), "idempotency_key": "1"},
        {**thumb(b), "idempotency_key": "1"},
        {**thumb(b), "idempotency_key": "4"},
    ]
    first, again = (client.post("/v1/feedback:batch", json={"items": items}) for _ in range(2))
    assert (first.status_code, again.status_code) == (200, 200)
    results = first.json()["data"]
    assert [(each["index"], each["status"]) for each in results] == list(enumerate([201, 400, 404, 400, 200, 409, 201]))
    assert [each["error"]["code"] for each in results if "error" in each] == [
        "invalid_request", "not_found", "invalid_request", "idempotency_conflict",
    ]  # fmt: skip
    assert (results[1]["error"]["param"], results[3]["error"]["param"]) == ("value", "idempotency_key")
    assert results[0]["feedback"] == results[4]["feedback"]
    assert [each["status"] for each in again.json()["data"]] == [200, 400, 404, 400, 200, 409, 200]
    assert rows(server) == 2
    many = [{**thumb(a), "idempotency_key": f"m{i}"} for i in range(501)]
    assert refused(client.post("/v1/feedback:batch", json={"items": many})) == (400, "invalid_request", "items")
    whole = client.post("/v1/feedback:batch", json={"items": many[:500]}).json()["data"]
    assert [each["status"] for each in whole] == [201] * 500
    assert rows(server) == 502
    assert refused(client.post("/v1/feedback:batch", json={"items": []}))[2] == "items"


def test_a_batch_may_be_longer_than_anything_else(server: Running, client: httpx.Client) -> None:
    (a,) = completions(answer(client))
    comment = {"kind": "comment", "target_type": "completion", "target_id": a, "value": "x" * 10_000}
    items = [{**comment, "idempotency_key": str(i)} for i in range(200)]
    assert [each["status"] for each in client.post("/v1/feedback:batch", json={"items": items}).json()["data"]] == [201] * 200
    assert refused(client.post("/v1/feedback", json={**comment, "padding": "x" * (1 << 20)})) == (413, "request_too_large", None)
    assert refused(client.post("/v1/feedback:batch", json={"items": [], "padding": "x" * (8 << 20)})) == (413, "request_too_large", None)


def test_an_opinion_changes_and_what_it_was_is_kept(server: Running, client: httpx.Client) -> None:
    (completion,) = completions(answer(client))
    first = said(client, thumb(completion), "1")
    url = f"/v1/feedback/{first['id']}"
    changed = client.patch(url, json={"kind": "thumb", "value": "down"}, headers={"Idempotency-Key": "2"})
    again = client.patch(url, json={"kind": "thumb", "value": "down"}, headers={"Idempotency-Key": "2"})
    assert (changed.status_code, again.status_code) == (201, 200)
    second = changed.json()
    assert (second["id"], second["supersedes_id"]) == (again.json()["id"], first["id"])
    assert (second["target_type"], second["target_id"]) == ("completion", completion)
    assert refused(client.patch(url, json={"kind": "thumb", "value": "up"})) == (409, "superseded", "id")
    assert refused(client.patch(url, json={"kind": "rating", "value": 3}))[1:] == ("invalid_value", "kind")
    assert refused(client.patch(url, json={"kind": "thumb", "value": "up", "target_id": "x"}))[2] == "target_id"
    history = client.get(url).json()["history"]
    assert [(each["id"], each["state"], each["value"]) for each in history] == [
        (first["id"], "superseded", "up"),
        (second["id"], "active", "down"),
    ]
    assert refused(client.delete(url)) == (409, "superseded", "id")
    gone = [client.delete(f"/v1/feedback/{second['id']}") for _ in range(2)]
    assert [(each.status_code, each.json()["state"]) for each in gone] == [(200, "retracted")] * 2
    assert client.get(f"/v1/feedback/{second['id']}").json()["history"] == [history[0], gone[0].json()]
    assert rows(server) == 2


def test_feedback_is_taken_the_moment_an_answer_is_there(client: httpx.Client) -> None:
    for i in range(25):
        (completion,) = completions(answer(client))
        assert post(client, thumb(completion)).status_code == 201, i
        with client.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as stream:
            events = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
        assert events[-1] == "[DONE]"
        streamed = json.loads(events[0])["choices"][0]["alignkit"]["completion_id"]
        assert post(client, thumb(streamed)).status_code == 201, i


def test_an_inference_can_be_judged_from_its_first_token_on(client: httpx.Client) -> None:
    with client.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as stream:
        first = next(line for line in stream.iter_lines() if line)
        inference = json.loads(first.removeprefix("data: "))["id"]
        assert post(client, thumb(inference, target_type="inference")).status_code == 201


def test_what_was_not_stored_is_told_from_what_never_was(server: Running, client: httpx.Client) -> None:
    unstored = answer(client, store=False)
    assert refused(post(client, thumb(completions(unstored)[0]))) == (409, "not_stored", "target_id")
    assert refused(post(client, thumb(unstored["id"], target_type="inference"))) == (409, "not_stored", "target_id")
    assert refused(post(client, thumb("cmp-none"))) == (404, "not_found", "target_id")
    erased = answer(client)
    assert client.delete(f"/v1/chat/completions/{erased['id']}").status_code == 200
    assert refused(post(client, thumb(completions(erased)[0]))) == (409, "not_stored", "target_id")
    assert rows(server) == 0


def test_others_see_and_change_nothing_and_an_admin_all(server: Running, client: httpx.Client) -> None:
    """Author, other and admin, over all routes that name feedback or list it."""
    (completion,) = completions(answer(client))
    first = said(client, thumb(completion), "k")
    url = f"/v1/feedback/{first['id']}"
    down = {"kind": "thumb", "value": "down"}
    unknown = (404, "not_found", "id")
    with server.http("feedback:write", "feedback:read") as other:
        for id in (first["id"], "fb-none"):
            assert refused(other.get(f"/v1/feedback/{id}")) == unknown
            assert refused(other.patch(f"/v1/feedback/{id}", json=down)) == unknown
            assert refused(other.delete(f"/v1/feedback/{id}")) == unknown
        # An id that is there and one that is not get the same words.
        words = [other.get(f"/v1/feedback/{id}").json()["error"]["message"].replace(id, "ID") for id in (first["id"], "fb-none")]
        assert words[0] == words[1]
        assert other.get("/v1/feedback").json()["data"] == []
        assert other.get("/v1/feedback", params={"target": completion}).json()["data"] == []
        # Under the author's idempotency key another says what they want, and learns nothing.
        assert said(other, thumb(completion, value="down"), "k")["id"] != first["id"]
        assert refused(other.post("/v1/feedback/metrics", json={"name": "m", "type": "bool", "level": "completion"}))[0] == 403
    assert client.get(url).json() == {**first, "history": [first]}
    with server.http("admin", "feedback:write", "feedback:read") as admin:
        assert admin.get(url).json()["id"] == first["id"]
        assert len(admin.get("/v1/feedback", params={"target": completion}).json()["data"]) == 2
        second = admin.patch(url, json=down).json()
        assert second["supersedes_id"] == first["id"]
        assert second["annotator_id"] != first["annotator_id"]  # Whoever changes it is who says so.
        assert admin.delete(f"/v1/feedback/{second['id']}").json()["state"] == "retracted"
    assert [each["state"] for each in client.get(url).json()["history"]] == ["superseded", "retracted"]


@pytest.mark.parametrize("scope", ["infer", "feedback:read", "feedback:write", "label", "export"])
def test_each_scope_allows_its_own(server: Running, scope: str) -> None:
    with server.http(scope) as client:
        writes = [post(client, thumb("cmp-none")), client.patch("/v1/feedback/x", json={"kind": "thumb", "value": "up"}),
                  client.delete("/v1/feedback/x"), client.post("/v1/feedback:batch", json={"items": [{}]})]  # fmt: skip
        reads = [client.get("/v1/feedback"), client.get("/v1/feedback/x"), client.get("/v1/feedback/metrics")]
        token = client.post("/v1/feedback/tokens", json={"inference_id": "chatcmpl-none"})
    assert {response.status_code == 403 for response in writes} == {scope != "feedback:write"}
    assert {response.status_code == 403 for response in reads} == {scope != "feedback:read"}
    assert (token.status_code == 403) == (scope not in ("infer", "feedback:write"))


def bearer(server: Running, token: str) -> httpx.Client:
    return httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {token}"}, timeout=30, trust_env=False)


def token(client: httpx.Client, inference: str, **fields: Any) -> str:
    response = client.post("/v1/feedback/tokens", json={"inference_id": inference, **fields})
    assert response.status_code == 201, response.text
    return str(response.json()["token"])


def test_a_token_speaks_for_one_person_of_one_inference(server: Running, client: httpx.Client) -> None:
    mine, other = answer(client, n=2, user="jane", alignkit={"episode_id": "talk-1"}), answer(client, user="jane")
    a, b = completions(mine)
    by_client = said(client, thumb(a))
    with bearer(server, token(client, mine["id"])) as browser:
        row = said(browser, thumb(a), "k")
        said(browser, thumb(mine["id"], target_type="inference"))
        pair = {"kind": "preference", "target_type": "group", "target_id": mine["alignkit"]["group_id"]}
        said(browser, {**pair, "value": {"a": a, "b": b, "choice": "b"}})
        assert row["annotator_id"] != by_client["annotator_id"]
        for target in (thumb(completions(other)[0]), thumb(other["id"], target_type="inference"), thumb("talk-1", target_type="episode")):
            assert refused(post(browser, target)) == (404, "not_found", "target_id")
        (result,) = browser.post("/v1/feedback:batch", json={"items": [{**thumb(completions(other)[0]), "idempotency_key": "x"}]}).json()[
            "data"
        ]
        assert result["status"] == 404
        assert browser.patch(f"/v1/feedback/{row['id']}", json={"kind": "thumb", "value": "down"}).status_code == 201
        assert len(browser.get("/v1/feedback").json()["data"]) == 4
        for method, path in (("GET", "/v1/feedback/{}"), ("PATCH", "/v1/feedback/{}"), ("DELETE", "/v1/feedback/{}")):
            body = {"json": {"kind": "thumb", "value": "down"}} if method == "PATCH" else {}
            assert refused(browser.request(method, path.format(by_client["id"]), **body))[:2] == (404, "not_found")
        # It opens nothing else.
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", f"/v1/chat/completions/{mine['id']}"),
                             ("POST", "/v1/feedback/tokens"), ("POST", "/v1/feedback/metrics"), ("GET", "/v1/admin/audit")):  # fmt: skip
            assert browser.request(method, path, json={}).status_code == 401
    with bearer(server, token(client, other["id"])) as elsewhere:
        # The same person, from another inference: the token is for that one alone.
        assert elsewhere.get("/v1/feedback").json()["data"] == []
        assert refused(elsewhere.delete(f"/v1/feedback/{row['id']}"))[:2] == (404, "not_found")
        assert said(elsewhere, thumb(completions(other)[0]))["annotator_id"] == row["annotator_id"]
    with bearer(server, token(client, mine["id"], user="joe")) as joe:
        assert said(joe, thumb(a), "k")["annotator_id"] not in (row["annotator_id"], by_client["annotator_id"])


def test_a_token_is_given_by_who_asked(server: Running, client: httpx.Client) -> None:
    asked = answer(client)
    with server.http("infer") as other:
        assert refused(other.post("/v1/feedback/tokens", json={"inference_id": asked["id"]})) == (404, "not_found", "inference_id")
    for wrong in ({"seconds": 86_401}, {"seconds": 0}, {"subject": "x"}, {"annotator_id": "x"}):
        assert client.post("/v1/feedback/tokens", json={"inference_id": asked["id"], **wrong}).status_code == 400


def test_a_token_that_was_changed_or_is_over_opens_nothing(server: Running, client: httpx.Client) -> None:
    asked = answer(client)
    text = token(client, asked["id"])
    signing = server.store.write(lambda connection: secret(connection, "feedback-tokens")).result()
    known = read(text, signing)
    assert known is not None
    assert known.inference_id == asked["id"]
    over = Pass(known.inference_id, known.subject, known.api_key_id, int(time.time()) - 1).text(signing)
    foreign = known.text(b"another secret")
    said_of, _, signature = text.partition(".")
    wrong = [
        over,
        foreign,
        text[:-1],
        text + "A",
        f"{said_of}.",
        f"{said_of}A.{signature}",
        "ft_",
        "ft_.",
        "ft_a.b",
        "ft_\xe9.x",
        text + ".",
    ]
    for each in wrong:
        response = httpx.get(f"{server.url}/v1/feedback", headers={"Authorization": f"Bearer {each}".encode("latin-1")}, trust_env=False)
        assert refused(response)[:2] == (401, "invalid_token"), each
    for place in range(3, len(text)):
        assert read(text[:place] + ("A" if text[place] != "A" else "B") + text[place + 1 :], signing) in (None, known)


def test_a_token_is_out_of_force_with_the_key_that_gave_it(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    key = server.key("infer", rate_rpm=1000)
    with bearer(server, key) as owner:
        text = token(owner, answer(owner)["id"])
    with bearer(server, text) as browser:
        assert browser.get("/v1/feedback").status_code == 200
        server.store.write(lambda connection: keys.revoke(connection, key.split("_")[1])).result()
        monkeypatch.setattr(server.app.state.keys, "_known", {})  # two seconds later
        assert refused(browser.get("/v1/feedback"))[:2] == (401, "invalid_token")


def test_without_keys_anyone_speaks_as_one_and_keys_of_idempotency_hold(database_url: str, tmp_path: Path) -> None:
    with (
        running(tmp_path / "only", database_url, auth=False, load=scripted(only=ScriptedEngine())) as server,
        httpx.Client(base_url=server.url, trust_env=False) as client,
    ):
        asked = answer(client)
        (completion,) = completions(asked)
        first = said(client, thumb(completion), "k")
        assert post(client, thumb(completion), "k").json() == first
        assert client.delete(f"/v1/feedback/{first['id']}").status_code == 200
        with bearer(server, token(client, asked["id"])) as browser:
            assert browser.get("/v1/feedback").json()["data"] == []
            assert said(browser, thumb(completion), "k")["annotator_id"] != first["annotator_id"]


def test_too_much_is_too_much(database_url: str, tmp_path: Path) -> None:
    limits = Limits(feedback_per_target_rpm=3)
    with running(tmp_path / "only", database_url, limits=limits, load=scripted(only=ScriptedEngine())) as server:
        with server.http(*ALL) as client:
            a, b = completions(answer(client, n=2))
            assert [post(client, thumb(a)).status_code for _ in range(3)] == [201] * 3
            late = post(client, thumb(a))
            assert refused(late)[:2] == (429, "rate_limited")
            assert 1 <= int(late.headers["Retry-After"]) <= 20
            items = [{**thumb(target), "idempotency_key": target} for target in (a, b)]
            assert [each["status"] for each in client.post("/v1/feedback:batch", json={"items": items}).json()["data"]] == [429, 201]
        with bearer(server, server.key("feedback:write", rate_rpm=2)) as slow:
            items = [{**thumb(b), "idempotency_key": str(i)} for i in range(5)]
            assert slow.post("/v1/feedback:batch", json={"items": items}).status_code == 200
            assert refused(post(slow, thumb(b)))[:2] == (429, "rate_limited")


def test_what_was_taken_and_what_was_not_is_counted_by_kind(server: Running, client: httpx.Client) -> None:
    (completion,) = completions(answer(client))
    row = said(client, thumb(completion), "k")
    post(client, thumb(completion), "k")
    post(client, thumb("cmp-none"))
    post(client, thumb(completion, value="left"))
    post(client, {"kind": "<nonsense>"})
    client.patch(f"/v1/feedback/{row['id']}", json={"kind": "thumb", "value": "down"})
    client.post("/v1/feedback:batch", json={"items": [{"kind": "rating"}, {"kind": 7}]})
    with server.http("admin") as admin:
        figures = admin.get("/metrics").text
    counted = {
        (kind, outcome): float(number)
        for kind, outcome, number in re.findall(r'alignkit_feedback_total\{kind="(\w+)",outcome="(\w+)"\} ([\d.]+)', figures)
    }
    assert counted == {
        ("thumb", "accepted"): 2.0,
        ("thumb", "repeated"): 1.0,
        ("thumb", "refused"): 2.0,
        ("rating", "refused"): 1.0,
        ("unknown", "refused"): 2.0,
    }


def test_when_the_store_fails_nothing_is_acknowledged(server: Running, client: httpx.Client) -> None:
    (completion,) = completions(answer(client))
    locked = server.store.write(lambda connection: time.sleep(7.0))  # longer than anybody waits for a lock
    response = post(client, thumb(completion), "k")
    assert refused(response)[:2] == (503, "store_unavailable")
    assert response.headers["Retry-After"]
    locked.result(60)
    assert rows(server) == 0
    assert post(client, thumb(completion), "k").status_code == 201


def test_what_cannot_be_stored_is_told_to_its_sender_and_harms_nobody_who_was_written_with_it(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'store.db'}"

    async def both(good: Opinion, bad: Opinion) -> list[Any]:
        scribe = Scribe(url)
        desk = Desk(scribe, CollectorRegistry(), per_target_rpm=10)
        try:
            return await asyncio.gather(*(desk.add([opinion]) for opinion in (good, bad, good)), return_exceptions=True)
        finally:
            await scribe.close()

    with Store.open(url) as store:
        _, completion_id = one_answer(store)
    good, bad = a_thumb(completion_id, idem_key="a"), a_thumb(completion_id, idem_key="b", value=float("nan"))
    first, broken, again = asyncio.run(both(good, bad))
    assert isinstance(broken, StoreError)
    assert (first[0].new, again[0].new) == (True, False)
    assert again[0].feedback.id == first[0].feedback.id
