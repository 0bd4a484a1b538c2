"""What is somebody's is nobody else's: every route that names a thing, asked by whoever might, and nobody is who they claim to be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from alignkit_serve.app import ROUTERS
from alignkit_serve.auth import PUBLIC, scopes_of
from alignkit_serve.store import Store, keys, labels, rounds
from alignkit_serve.store.annotators import Author
from tests.serve.fakes import ScriptedEngine, scripted
from tests.serve.running import Running, running
from tests.serve.store.rows import a_round, an_export, stored_policy

ROUTES = scopes_of(ROUTERS)

OWNER = ("infer", "feedback:write", "feedback:read", "label", "export")
"""What the author's key may do, and another's."""

CALLERS = ("author", "other", "token", "other token", "admin", "nobody")
"""The author's key; another application's; feedback tokens that each of them gave for their own answer; an admin's alone; no key."""

CASES: dict[str, tuple[int, int, int, int, int, int]] = {
    # One's own is there, another's is as good as none, and a token opens feedback on one answer.
    "GET /v1/feedback/{id}": (200, 404, 404, 404, 403, 401),
    "PATCH /v1/feedback/{id}": (201, 404, 404, 404, 403, 401),
    "DELETE /v1/feedback/{id}": (200, 404, 404, 404, 403, 401),
    "GET /v1/chat/completions/{id}": (200, 404, 401, 401, 403, 401),
    "GET /v1/chat/completions/{id}/messages": (200, 404, 401, 401, 403, 401),
    "POST /v1/chat/completions/{id}": (200, 404, 401, 401, 403, 401),
    "DELETE /v1/chat/completions/{id}": (200, 404, 401, 401, 403, 401),
    # A page's assignment is its annotator's.
    "POST /label/{id}": (422, 404, 401, 401, 403, 401),
    "POST /label/{id}/heartbeat": (200, 404, 401, 401, 403, 401),
    "PUT /label/{id}/draft": (200, 404, 401, 401, 403, 401),
    "POST /label/{id}/skip": (303, 404, 401, 401, 403, 401),
    "POST /label/{id}/undo": (303, 404, 401, 401, 403, 401),
    # What is everybody's who has the scope.
    "GET /v1/exports/{id}": (200, 200, 401, 401, 403, 401),
    "GET /v1/models/{id:path}": (200, 200, 401, 401, 403, 401),
    # What is for those who run the server.
    "GET /v1/rounds/{id}": (403, 403, 401, 401, 200, 401),
    "GET /v1/lineage/feedback/{id}": (403, 403, 401, 401, 200, 401),
    "GET /v1/lineage/policy/{id:path}": (403, 403, 401, 401, 200, 401),
    "DELETE /v1/subjects/{id:path}": (403, 403, 401, 401, 200, 401),
    "DELETE /v1/label/tasks/{id}": (403, 403, 401, 401, 200, 401),
    "POST /v1/admin/policies/{id}/promote": (403, 403, 401, 401, 200, 401),
}
"""What each of the callers is told, of a thing that is the author's."""

NAMELESS = {
    # Lists show one's own, which is tested below; the others make something, or show what is nobody's.
    *("GET /v1/feedback", "POST /v1/feedback", "POST /v1/feedback:batch", "POST /v1/feedback/tokens"),
    *("GET /v1/feedback/metrics", "POST /v1/feedback/metrics", "GET /v1/chat/completions", "POST /v1/chat/completions"),
    *("POST /v1/completions", "GET /v1/models", "GET /v1/exports", "POST /v1/exports", "GET /v1/rounds", "POST /v1/rounds"),
    *("GET /v1/admin/policies", "POST /v1/admin/policies", "POST /v1/admin/rollback", "GET /v1/admin/audit", "GET /metrics"),
    *("GET /v1/label/tasks", "POST /v1/label/tasks", "POST /v1/label/tasks:import", "POST /v1/label/tasks:collect"),
    *("GET /v1/label/agreement", "GET /label", "GET /label/admin", "GET /label/admin.csv", "POST /label/logout"),
}
"""Routes that name no one thing."""


def test_every_route_has_a_case() -> None:
    """Whoever adds one says here who may see what through it."""
    public = {route for route, scope in ROUTES.items() if scope == PUBLIC}
    assert set(ROUTES) - public == set(CASES) | NAMELESS
    assert {route for route in ROUTES if "{id" in route} == set(CASES)


@dataclass
class World:
    """A server with two applications and an admin; ``things`` are the author's, by the route that names them."""

    server: Running
    credentials: dict[str, str | None]
    things: dict[str, str]

    def call(self, route: str, caller: str, **options: Any) -> httpx.Response:
        method, path = route.split(" ")
        url = self.server.url + path.replace("{id:path}", "{id}").replace("{id}", self.things.get(route, "x"))
        credential = self.credentials[caller]
        headers = {"Authorization": f"Bearer {credential}"} if credential else {}
        given = {**BODIES.get(route, {}), **options}
        return httpx.request(method, url, headers=headers, trust_env=False, timeout=30, **given)


BODIES: dict[str, dict[str, Any]] = {
    "PATCH /v1/feedback/{id}": {"json": {"kind": "thumb", "value": "down"}},
    "POST /v1/chat/completions/{id}": {"json": {"metadata": {"a": "b"}}},
    "PUT /label/{id}/draft": {"json": {"cards": [{}, {}]}},
    "POST /label/{id}": {"data": {}},
    "POST /label/{id}/skip": {"data": {"reason": "too long"}},
}


def answer(server: Running, key: str, n: int = 1) -> dict[str, Any]:
    body = {"model": "live", "n": n, "user": "jane", "messages": [{"role": "user", "content": "Hello?"}]}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"}, trust_env=False)
    assert response.status_code == 200, response.text
    return dict(response.json())


def a_token(server: Running, key: str, inference_id: str) -> str:
    response = httpx.post(
        f"{server.url}/v1/feedback/tokens",
        json={"inference_id": inference_id, "user": "joe"},
        headers={"Authorization": f"Bearer {key}"},
        trust_env=False,
    )
    assert response.status_code == 201, response.text
    return str(response.json()["token"])


@contextmanager
def a_world(folder: Path) -> Iterator[World]:
    load = scripted(only=ScriptedEngine(), next=ScriptedEngine())
    with running(folder / "only", f"sqlite:///{folder / 'store.db'}", load=load) as server:
        author, other = server.key(*OWNER, rate_rpm=6000), server.key(*OWNER, rate_rpm=6001)
        mine, theirs = answer(server, author, n=2), answer(server, other)
        credentials = {
            "author": author,
            "other": other,
            "token": a_token(server, author, mine["id"]),
            "other token": a_token(server, other, theirs["id"]),
            "admin": server.key("admin"),
            "nobody": None,
        }
        yield World(server, credentials, things_of(server, author, mine))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with a_world(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """For tests in which everything is refused."""
    with a_world(tmp_path_factory.mktemp("idor")) as made:
        yield made


def things_of(server: Running, author: str, mine: dict[str, Any]) -> dict[str, str]:
    """One thing of each kind, made by the author or for them."""
    store: Store = server.store
    thumb = {"kind": "thumb", "target_type": "completion", "target_id": mine["choices"][0]["alignkit"]["completion_id"], "value": "up"}
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {author}"}, trust_env=False) as client:
        feedback = client.post("/v1/feedback", json=thumb).json()["id"]
    with server.http("admin") as admin:
        admin.post("/v1/admin/policies", json={"path": "next"})
        task = admin.post("/v1/label/tasks", json={"group_id": mine["alignkit"]["group_id"], "overlap": 1}).json()["id"]
    author_id = store.read(lambda connection: key_id(connection, author))
    given = store.write(lambda connection: labels.next_assignment(connection, Author(author_id), datetime.now(UTC))).result()
    assert given is not None
    export = an_export(store, [feedback])
    made = a_round(stored_policy(store), stored_policy(store), export)
    store.write(lambda connection: rounds.add(connection, made)).result()
    by_kind = {
        "/v1/feedback/": feedback,
        "/v1/lineage/feedback/": feedback,
        "/v1/chat/completions/": mine["id"],
        "/label/": given.id,
        "/v1/exports/": export.id,
        "/v1/models/": "live",
        "/v1/rounds/": made.id,
        "/v1/lineage/policy/": "id-only",
        "/v1/subjects/": "jane",
        "/v1/label/tasks/": task,
        "/v1/admin/policies/": "id-next",
    }
    return {route: thing for route in CASES for begin, thing in by_kind.items() if route.split(" ")[1].startswith(begin)}


def key_id(connection: Any, text: str) -> str:
    found = keys.find(connection, text)
    assert found is not None
    return found.id


@pytest.mark.parametrize("route", CASES)
def test_who_may(world: World, route: str) -> None:
    expected = dict(zip(CALLERS, CASES[route], strict=True))
    # The author last: they may take it away.
    order = sorted(CALLERS, key=lambda caller: expected[caller] < 400)
    found = {caller: world.call(route, caller).status_code for caller in order}
    assert found == expected


@pytest.mark.parametrize("route", [route for route, told in CASES.items() if told[1] == 404])
def test_anothers_thing_is_told_of_as_one_that_is_not_there(unchanged: World, route: str) -> None:
    """Not even whether it exists is told: the same words, but for the id."""
    real, thing = unchanged.call(route, "other"), unchanged.things[route]
    made_up = replace(unchanged, things={route: "no-such-id"}).call(route, "other")
    assert real.status_code == made_up.status_code == 404
    assert real.text.replace(thing, "no-such-id") == made_up.text


def test_lists_show_ones_own(world: World) -> None:
    for route in ("GET /v1/feedback", "GET /v1/chat/completions"):
        mine = [each["id"] for each in world.call(route, "author").json()["data"]]
        theirs = [each["id"] for each in world.call(route, "other").json()["data"]]
        assert len(mine) == 1
        assert not set(mine) & set(theirs)
    assert world.call("GET /v1/feedback", "token").json()["data"] == []
    assert world.call("GET /v1/feedback", "other token").json()["data"] == []


def test_an_admin_who_may_read_sees_all(world: World) -> None:
    world.credentials["admin"] = world.server.key("admin", "infer", "feedback:write", "feedback:read")
    for route in ("GET /v1/feedback/{id}", "PATCH /v1/feedback/{id}", "GET /v1/chat/completions/{id}"):
        assert world.call(route, "admin").status_code in (200, 201), route


def test_a_token_speaks_of_its_own_answer_alone(world: World) -> None:
    completion = world.call("GET /v1/chat/completions/{id}", "author").json()["choices"][0]["alignkit"]["completion_id"]
    thumb = {"kind": "thumb", "target_type": "completion", "target_id": completion, "value": "up"}
    assert world.call("POST /v1/feedback", "token", json=thumb).status_code == 201
    assert world.call("POST /v1/feedback", "other token", json=thumb).status_code == 404
    assert (
        world.call("POST /v1/feedback:batch", "other token", json={"items": [{**thumb, "idempotency_key": "k"}]}).json()["data"][0][
            "status"
        ]
        == 404
    )
    # A token gives no other.
    mine = world.things["GET /v1/chat/completions/{id}"]
    assert world.call("POST /v1/feedback/tokens", "token", json={"inference_id": mine}).status_code == 401
    assert world.call("POST /v1/feedback/tokens", "other", json={"inference_id": mine}).status_code == 404


FORGED = (
    *("annotator_id", "api_key_id", "author", "subject", "user_id", "source", "state", "weight", "id", "scopes", "is_admin"),
    *("tainted_at", "created_at", "promoted", "created_by", "policy_version_id", "consent_train", "redaction"),
)
TAKES: dict[str, tuple[str, dict[str, Any]]] = {
    "POST /v1/feedback": ("author", {"kind": "thumb", "target_type": "completion", "target_id": "cmp-x", "value": "up"}),
    "PATCH /v1/feedback/{id}": ("author", {"kind": "thumb", "value": "down"}),
    "POST /v1/feedback/tokens": ("author", {"inference_id": "chatcmpl-x"}),
    "POST /v1/feedback/metrics": ("admin", {"name": "clear", "type": "bool", "level": "completion"}),
    "POST /v1/chat/completions/{id}": ("author", {"metadata": {}}),
    "POST /v1/exports": ("author", {"name": "may", "shape": "labels"}),
    "POST /v1/admin/policies": ("admin", {"path": "next"}),
    "POST /v1/label/tasks": ("admin", {"group_id": "grp-x", "overlap": 1}),
    "POST /v1/label/tasks:import": ("admin", {"prompt": "a", "responses": ["b", "c"], "overlap": 1}),
    "POST /v1/label/tasks:collect": ("admin", {"origins": ["n"], "overlap": 1}),
    "PUT /label/{id}/draft": ("author", {"cards": [{}, {}]}),
    "POST /v1/rounds": (
        "admin",
        {
            "name": "round-1",
            "config_sha256": "c0" * 32,
            "parent_policy_id": "id-only",
            "child_policy_id": "id-next",
            "promote": False,
            "exports": [],
            "metrics": {},
            "started_at": "2026-05-04T09:00:00Z",
            "finished_at": "2026-05-04T10:00:00Z",
        },
    ),
}
"""Routes that take an object, with one that has the right form."""

OPEN = {"POST /v1/chat/completions", "POST /v1/completions", "POST /v1/feedback:batch"}
"""OpenAI's, which accept and name what they do not know; and batches, whose items are looked at one by one (``test_feedback``)."""

BY_HAND = {"POST /v1/feedback"}
"""Which reads its object without FastAPI."""


def test_every_route_that_takes_an_object_is_tried() -> None:
    takes = {
        f"{method} {route.path}"
        for router in ROUTERS
        for route in router.routes
        if getattr(route, "body_field", None) is not None
        for method in getattr(route, "methods", ())
    }
    assert takes | BY_HAND == set(TAKES) | OPEN


@pytest.mark.parametrize("route", TAKES)
def test_nothing_is_assigned_that_is_not_asked_for(unchanged: World, route: str) -> None:
    caller, body = TAKES[route]
    for name in FORGED:
        if name in body:
            continue
        refused = unchanged.call(route, caller, json={**body, name: "x"})
        assert refused.status_code == 400, (name, refused.text)
        assert name in json.dumps(refused.json()["error"]), (name, refused.text)
