"""Making label tasks, over HTTP and from the command line; whatever is made twice is there once."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner, Result
from sqlalchemy import update

from alignkit.cli import cli
from alignkit_serve.engine import Encoded, Parameters, Piece, Token
from alignkit_serve.label_making import Recipe, tiers
from alignkit_serve.store import labels
from alignkit_serve.store.annotators import Author
from alignkit_serve.store.tables import inference
from tests.serve.fakes import ScriptedEngine, scripted
from tests.serve.running import Running, running

ALL = ("infer", "feedback:write", "admin")
ASK = {"model": "live", "messages": [{"role": "user", "content": "Hello?"}], "alignkit": {"consent": {"train": True}}}


@dataclass
class Talkative(ScriptedEngine):
    """Says which of its ``different`` answers it gives; a prompt of "same" always gets the first, one of "long" is too long."""

    different: int = 9

    async def generate(self, prompt: Encoded, parameters: Parameters) -> AsyncGenerator[Piece]:
        self.begun += 1
        self.seen.append(parameters)
        said = prompt.prompt.messages[-1].content
        number = 0 if said == "same" else parameters.noise[1] % self.different
        text = f"Answer {number} to {said}"
        yield Piece(text, (), (Token(number, text.encode(), -0.5, -0.25),), "stop")
        self.finished += 1


@pytest.fixture
def engine() -> Talkative:
    return Talkative()


@pytest.fixture
def server(database_url: str, tmp_path: Path, engine: Talkative) -> Iterator[Running]:
    with running(tmp_path / "only", database_url, load=scripted(only=engine)) as started:
        yield started


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.http(*ALL) as client:
        yield client


def answered(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/chat/completions", json={**ASK, **fields})
    assert response.status_code == 200, response.text
    return dict(response.json())


def completions(*answers: dict[str, Any]) -> list[str]:
    return [choice["alignkit"]["completion_id"] for answer in answers for choice in answer["choices"]]


def post(client: httpx.Client, body: Any, path: str = "") -> tuple[int, dict[str, Any]]:
    response = client.post(f"/v1/label/tasks{path}", json=body)
    return response.status_code, response.json()


def refused(client: httpx.Client, body: Any, path: str = "") -> tuple[int, str, str | None]:
    status, answer = post(client, body, path)
    return status, answer["error"]["code"], answer["error"]["param"]


def listing(client: httpx.Client, **wanted: Any) -> list[dict[str, Any]]:
    return list(client.get("/v1/label/tasks", params=wanted).json()["data"])


def test_a_task_of_completions_is_made_once(client: httpx.Client) -> None:
    a, b, c = completions(answered(client), answered(client, n=2))
    status, task = post(client, {"completion_ids": [a, b, c], "overlap": 2, "priority": 3, "gold": [[2], [a, 1]]})
    assert status == 201
    assert (task["completion_ids"], task["overlap"], task["priority"], task["state"]) == ([a, b, c], 2, 3, "open")
    assert (task["origin"], task["gold"], task["assignments"]) == ("label_pool", [[c], [a, b]], {})
    again = post(client, {"completion_ids": [a, b, c], "overlap": 2, "priority": 3, "gold": [[c], [a, b]]})
    assert again == (200, task)
    assert listing(client) == [task]
    assert refused(client, {"completion_ids": [c, b, a], "overlap": 9}) == (409, "conflict", None)


def test_a_task_of_a_group_and_its_withdrawal(client: httpx.Client) -> None:
    group = answered(client, n=2)["alignkit"]["group_id"]
    _, task = post(client, {"group_id": group})
    assert (task["group_id"], task["origin"], task["overlap"], task["gold"]) == (group, "n", 1, None)
    gone = client.delete(f"/v1/label/tasks/{task['id']}").json()
    assert gone == {**task, "state": "withdrawn"}
    assert client.delete(f"/v1/label/tasks/{task['id']}").json() == gone
    assert client.delete("/v1/label/tasks/task-none").status_code == 404
    assert (listing(client, state="open"), listing(client, state="withdrawn")) == ([], [gone])


def test_what_cannot_be_a_task(client: httpx.Client) -> None:
    a, b = completions(answered(client, n=2))
    other = completions(answered(client, messages=[{"role": "user", "content": "Why?"}]))
    group = answered(client, n=2)["alignkit"]["group_id"]
    assert refused(client, {"completion_ids": [a, *other]}) == (400, "invalid_value", "completion_ids")
    assert refused(client, {"completion_ids": [a, "cmp-none"]}) == (404, "not_found", "completion_ids")
    assert refused(client, {"group_id": "grp-none"}) == (404, "not_found", "group_id")
    for gold in ([[a]], [[a], [b], [b]], [[0], [2]], [["x"], [b]]):
        assert refused(client, {"completion_ids": [a, b], "gold": gold}) == (400, "invalid_value", "gold")
    invalid: list[dict[str, Any]] = [
        {},
        {"completion_ids": [a]},
        {"completion_ids": [a, a]},
        {"completion_ids": [str(i) for i in range(10)]},
        {"completion_ids": [a, b], "group_id": group},
        {"group_id": group, "tag": "t"},
        {"group_id": group, "overlap": 0},
        {"group_id": group, "overlap": "1"},
        {"group_id": group, "gold": [[True], [1]]},
        {"group_id": group, "gold": []},
        {"group_id": group, "annotator": "me"},
    ]
    for body in invalid:
        assert refused(client, body)[:2] == (400, "invalid_request"), body
    assert listing(client) == []


def test_what_is_not_stored_any_more_cannot_be_a_task(client: httpx.Client) -> None:
    gone, kept = answered(client), answered(client)
    client.delete(f"/v1/chat/completions/{gone['id']}").raise_for_status()
    assert refused(client, {"completion_ids": completions(gone, kept)}) == (409, "not_stored", "completion_ids")


def test_only_an_admin_makes_tasks(server: Running) -> None:
    with server.http("infer", "label") as stranger:
        for method, path in (("POST", ""), ("POST", ":import"), ("POST", ":collect"), ("GET", ""), ("DELETE", "/task-1")):
            assert stranger.request(method, f"/v1/label/tasks{path}", json={}).status_code == 403
        assert stranger.get("/v1/label/agreement").status_code == 403


def test_a_tag_is_one_task_whatever_is_named_under_it(client: httpx.Client) -> None:
    a, b, c = completions(answered(client, n=3))
    status, task = post(client, {"completion_ids": [a, b], "tag": "mine"})
    assert (status, task["tag"]) == (201, "mine")
    assert post(client, {"completion_ids": [b, c], "tag": "mine"}) == (200, task)
    _, untagged = post(client, {"completion_ids": [a, b]})
    assert untagged["id"] != task["id"]
    assert (listing(client, tag="mine"), listing(client, tag="other")) == ([task], [])


def test_texts_from_elsewhere_are_brought_once(server: Running, client: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "2 + 2?"}], "responses": ["4", "5", "four"], "gold": [[0, 2], [1]], "overlap": 3}
    status, task = post(client, body, ":import")
    four, five, word = task["completion_ids"]
    assert (status, task["origin"], task["gold"]) == (201, "import", [[four, word], [five]])
    assert post(client, body, ":import") == (200, task)
    _, plain = post(client, {"prompt": "2 + 2 =", "responses": ["4", "5"]}, ":import")
    assert plain["prompt_sha256"] != task["prompt_sha256"]
    author = Author(None)
    given = server.store.write(lambda connection: labels.next_assignment(connection, author, datetime.now(UTC))).result()
    assert given
    shown = server.store.read(lambda connection: labels.material(connection, given))
    assert (shown.messages, sorted(shown.texts)) in [
        ([{"role": "user", "content": "2 + 2?"}], ["4", "5", "four"]),
        ([{"role": "prompt", "content": "2 + 2 ="}], ["4", "5"]),
    ]
    states = {one["name"]: one["state"] for one in client.get("/v1/admin/policies").json()["data"]}
    assert states["imported"] == "retired"
    assert client.get("/v1/chat/completions").json()["data"] == []
    ranking = {"kind": "ranking", "target_type": "group", "target_id": task["group_id"], "value": [[word], [four, five]]}
    assert client.post("/v1/feedback", json=ranking).status_code == 201


def test_texts_that_cannot_be_ranked_are_refused(client: httpx.Client) -> None:
    invalid: list[dict[str, Any]] = [
        {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "responses": ["a", "b"]},
        {"responses": ["a", "b"]},
        {"prompt": "x", "responses": ["a"]},
        {"prompt": "x", "responses": ["a", "a"]},
        {"prompt": "x", "responses": ["a", " "]},
        {"prompt": "x", "responses": ["a", "b"], "policy": "p"},
        {"messages": [{"role": "robot", "content": "x"}], "responses": ["a", "b"]},
        {"messages": [{"role": "assistant", "content": "x"}], "responses": ["a", "b"]},
    ]
    for body in invalid:
        assert refused(client, body, ":import")[:2] == (400, "invalid_request"), body


def test_traffic_is_collected_where_it_may_be_and_differs(server: Running, client: httpx.Client) -> None:
    first, second = answered(client, n=2), answered(client, n=3)
    answered(client, n=2, alignkit={})  # without consent
    answered(client, n=2, messages=[{"role": "user", "content": "same"}])
    answered(client)  # one answer
    gone, expired = answered(client, n=2), answered(client, n=2)
    client.delete(f"/v1/chat/completions/{gone['id']}").raise_for_status()
    yesterday = datetime.now(UTC) - timedelta(days=1)
    stale = update(inference).where(inference.c.id == expired["id"]).values(retention_until=yesterday)
    server.store.write(lambda connection: connection.execute(stale)).result()
    wanted = {"origins": ["n", "ab"], "overlap": 2, "limit": 1}
    groups = []
    for _ in range(4):
        status, made = post(client, wanted, ":collect")
        assert status == 200
        groups.append([task["group_id"] for task in made["data"]])
    assert groups == [[first["alignkit"]["group_id"]], [second["alignkit"]["group_id"]], [], []]
    assert [task["overlap"] for task in listing(client)] == [2, 2]


# The command line.


@dataclass
class Command:
    """``alignkit label`` against a server."""

    server: Running
    folder: Path

    def __call__(self, *arguments: str, code: int = 0) -> Result:
        environment = {"ALIGNKIT_API_KEY": self.server.key(*ALL), "ALIGNKIT_URL": self.server.url}
        result = CliRunner().invoke(cli, ["label", *arguments], env=environment)
        assert result.exit_code == code, result.output
        return result

    def file(self, *rows: Any) -> str:
        path = self.folder / "rows.jsonl"
        path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
        return str(path)


@pytest.fixture
def label(tmp_path: Path, engine: Talkative) -> Iterator[Command]:
    with running(tmp_path / "only", f"sqlite:///{tmp_path / 'store.db'}", load=scripted(only=engine)) as started:
        yield Command(started, tmp_path)


def test_make_samples_drops_what_is_the_same_and_goes_on(label: Command, engine: Talkative) -> None:
    engine.different = 3
    talk = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]}
    path = label.file({"prompt": "Once upon"}, talk, {"prompt": "same"}, {"prompt": "Once upon"})
    made = label("make", path, "--answers", "5", "--overlap", "2", "--temperature", "0.5", "--max-tokens", "7")
    assert made.stdout == "3 of 3 prompts: 2 tasks made, 0 were there, 1 left out\n"
    assert f"{path}:3: left out: its 5 answers are the same or empty, and nobody could rank them\n" in made.stderr
    assert {(parameters.temperature, parameters.max_tokens) for parameters in engine.seen} == {(0.5, 7)}
    with label.server.http(*ALL) as client:
        tasks = listing(client)
    assert [(len(task["completion_ids"]), task["overlap"], task["origin"]) for task in tasks] == [(3, 2, "label_pool")] * 2
    begun = engine.begun
    again = label("make", path, "--answers", "5", "--temperature", "0.5", "--max-tokens", "7")
    assert again.stdout == "3 of 3 prompts: 0 tasks made, 2 were there, 1 left out\n"
    assert engine.begun == begun + 5  # Only what was left out is asked for again.
    assert label("make", path, "--answers", "3").stdout.startswith("3 of 3 prompts: 2 tasks made")


def test_make_goes_on_where_it_was_stopped(label: Command, engine: Talkative) -> None:
    path = label.file(*({"prompt": f"prompt {i}"} for i in range(40)))
    first = label.folder / "first.jsonl"
    first.write_text("".join(Path(path).read_text().splitlines(keepends=True)[:15]))
    assert label("make", str(first), "--answers", "2").stdout == "15 of 15 prompts: 15 tasks made, 0 were there\n"
    rest = label("make", path, "--answers", "2")
    assert rest.stdout == "40 of 40 prompts: 25 tasks made, 15 were there\n"
    assert "20 of 40 prompts: " in rest.stderr
    assert engine.begun == 80


def test_make_says_what_is_wrong(label: Command) -> None:
    path = label.file({"prompt": "x"}, {"promt": "y"})
    assert f"{path}:2: the columns are promt; needed: prompt; or messages" in label("make", path, code=2).stderr
    good = label.file({"prompt": "x"})
    assert "has no policy 'ppo'; it has: live, only@1" in label("make", good, "--policy", "ppo", code=2).stderr
    assert "cannot be reached" in label("make", good, "--url", "http://127.0.0.1:9", code=2).stderr
    assert "refuses: there is no API key in force" in label("make", good, "--key", "ak_none", code=2).stderr
    tool = label.file({"messages": [{"role": "tool", "content": "4"}]}, {"prompt": "y"})
    made = label("make", tool)
    assert made.stdout == "2 of 2 prompts: 1 tasks made, 0 were there, 1 left out\n"
    assert f"{tool}:1: left out: " in made.stderr


def test_the_same_policy_named_twice_is_one(label: Command, engine: Talkative) -> None:
    label("make", label.file({"prompt": "x"}), "--policy", "live", "--policy", "only@1", "--policy", "only", "--answers", "3")
    assert engine.begun == 3


def test_answers_are_split_evenly_and_asked_for_with_a_seed_of_their_own() -> None:
    recipe = Recipe(policies=("a@1", "b@2"), answers=5, temperature=1.0, max_tokens=16)
    assert recipe.shares() == [("a@1", 3), ("b@2", 2)]


def test_import_takes_ranks_for_gold(label: Command) -> None:
    rows = [
        {"prompt": "2 + 2 =", "responses": ["5", "4", "vier"], "ranks": [2, 1, 1]},
        {"messages": [{"role": "user", "content": "x"}], "prompt": [{"role": "user", "content": "Hi"}], "responses": ["Hello", "Go away"]},
        {"prompt": "3 + 3 =", "chosen": "6", "rejected": "7"},
    ]
    path = label.file(*rows)
    assert label("import", path, "--overlap", "3").stdout == "3 of 3 prompts: 3 tasks made, 0 were there\n"
    assert label("import", path, "--overlap", "3").stdout == "3 of 3 prompts: 0 tasks made, 3 were there\n"
    with label.server.http(*ALL) as client:
        tasks = {len(task["completion_ids"]): task for task in listing(client)}
        golden = [task["gold"] for task in listing(client) if task["gold"]]
    five, four, word = tasks[3]["completion_ids"]
    assert tasks[3]["gold"] == [[four, word], [five]]
    assert len(golden) == 2
    assert "has the task" in label("import", path, "--overlap", "2", code=2).stderr


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "x", "responses": ["a"]}, "responses has 1 entries"),
        ({"prompt": "x", "responses": "a"}, "responses is"),
        ({"prompt": "x", "responses": ["a", "b"], "ranks": [1]}, "there are 1 ranks for 2 responses"),
        ({"prompt": "x", "responses": ["a", "a"]}, "two of the responses are the same"),
        ("{", "not JSON"),
    ],
)
def test_import_names_the_row_that_is_wrong(label: Command, row: Any, problem: str) -> None:
    path = label.file(row)
    told = label("import", path, code=2).stderr
    assert f"{path}:1" in told
    assert problem in told


def test_collect_and_status(label: Command) -> None:
    with label.server.http(*ALL) as client:
        answered(client, n=2)
    assert label("collect").stdout == "0 tasks made\n"
    assert label("collect", "--origin", "n").stdout == "1 tasks made\n"
    told = label("status").stdout
    assert "tasks                  1 open\n" in told
    assert "alpha, pairs           too few\n" in told


def test_tiers() -> None:
    assert tiers([2, 1, 1, 5]) == [[1, 2], [0], [3]]
