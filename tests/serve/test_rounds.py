"""Rounds, lineage and erasure over HTTP and in a terminal: recorded and promoted in one, told both ways, and erased down to the files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from sqlalchemy import func, select

from alignkit.cli import cli
from alignkit_serve.exporting import ROWS
from alignkit_serve.store import Store, audit, lineage, policies
from alignkit_serve.store.tables import training_round
from tests.serve.fakes import ScriptedEngine, scripted
from tests.serve.running import Running, running, until
from tests.serve.store.rows import a_round, an_export, stored_policy
from tests.serve.store.test_feedback import a_key, a_thumb, one_answer, said
from tests.serve.store.test_lineage import record

ALL = ("infer", "feedback:write", "feedback:read", "admin")


@pytest.fixture
def server(database_url: str, tmp_path: Path) -> Iterator[Running]:
    load = scripted(only=ScriptedEngine(), next=ScriptedEngine(), other=ScriptedEngine())
    with running(tmp_path / "only", database_url, load=load) as started:
        yield started


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.http(*ALL) as client:
        yield client


def a_body(**fields: Any) -> dict[str, Any]:
    return {
        "name": "round-1",
        "config_sha256": "c0" * 32,
        "git_sha": "0123abc",
        "parent_policy_id": "id-only",
        "child_policy_id": "id-next",
        "promote": True,
        "exports": [],
        "metrics": {
            "win_rate": 0.61,
            "ci95_low": 0.55,
            "ci95_high": 0.67,
            "kl_first_nats": 3.2,
            "agreement": {"value": 0.75},
        },
        "started_at": "2026-05-04T09:00:00+02:00",
        "finished_at": "2026-05-04T08:00:00Z",
        **fields,
    }


def live(client: httpx.Client) -> str:
    return next(each["id"] for each in client.get("/v1/admin/policies").json()["data"] if each["state"] == "live")


def state(client: httpx.Client, id: str) -> str:
    return next(each["state"] for each in client.get("/v1/admin/policies").json()["data"] if each["id"] == id)


def stage(client: httpx.Client, name: str = "next") -> None:
    assert client.post("/v1/admin/policies", json={"path": name}).status_code == 200


def told(response: httpx.Response) -> tuple[int, str, str | None]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


def count(server: Running) -> int:
    return server.store.read(lambda connection: connection.scalar(select(func.count()).select_from(training_round))) or 0


def test_a_round_is_recorded_and_its_policy_promoted(server: Running, client: httpx.Client) -> None:
    stage(client)
    data = an_export(server.store)
    made = client.post("/v1/rounds", json=a_body(exports=[data.id]))
    assert made.status_code == 201, made.text
    found = made.json()
    assert (found["object"], found["promoted"], found["exports"]) == ("round", True, [data.id])
    assert (found["started_at"], found["metrics"]) == ("2026-05-04T07:00:00+00:00", a_body()["metrics"])
    assert live(client) == "id-next"
    assert client.get("/v1/rounds").json() == {"object": "list", "data": [found]}
    assert client.get(f"/v1/rounds/{found['id']}").json() == found
    version = server.store.read(lambda connection: policies.get(connection, "id-next"))
    assert version is not None
    assert (version.parent_id, version.evaluation) == ("id-only", found["metrics"])
    entries = server.store.read(lambda connection: audit.entries(connection, 3))
    assert [(entry.action, entry.object) for entry in entries] == [("round", found["id"]), ("promote", "id-next"), ("stage", "id-next")]
    assert entries[0].actor.startswith("key ")
    assert entries[0].detail == {"name": "round-1", "child": "id-next", "parent": "id-only", "promoted": True, "exports": [data.id]}
    assert server.store.read(audit.verify) is None


def test_sent_again_nothing_happens_again_even_after_a_rollback(server: Running, client: httpx.Client) -> None:
    stage(client)
    first = client.post("/v1/rounds", json=a_body())
    again = client.post("/v1/rounds", json=a_body())
    assert (first.status_code, again.status_code, again.json()) == (201, 200, first.json())
    assert client.post("/v1/admin/rollback").status_code == 200
    assert client.post("/v1/rounds", json=a_body()).json() == first.json()
    assert live(client) == "id-only"
    assert count(server) == 1
    rounds = [entry for entry in server.store.read(lambda connection: audit.entries(connection, 20)) if entry.action == "round"]
    assert len(rounds) == 1


def test_a_refused_policy_is_recorded_and_not_promoted_until_somebody_says_so(server: Running, client: httpx.Client) -> None:
    stage(client)
    body = a_body(promote=False, metrics={"win_rate": 0.5, "refused_because": "it wins half"})
    refused = client.post("/v1/rounds", json=body)
    assert (refused.status_code, refused.json()["promoted"], live(client)) == (201, False, "id-only")
    until(lambda: state(client, "id-next") == "retired")
    assert told(client.post("/v1/rounds", json={**body, "promote": True})) == (409, "conflict", "child_policy_id")
    stage(client)
    promoted = client.post("/v1/rounds", json={**body, "promote": True})
    assert (promoted.status_code, promoted.json()) == (201, {**refused.json(), "promoted": True})
    assert live(client) == "id-next"
    back = client.post("/v1/rounds", json=body)
    assert told(back) == (409, "conflict", None)


def test_where_the_round_is_refused_the_policy_is_not_promoted(server: Running, client: httpx.Client) -> None:
    stage(client)
    for wrong in (a_body(exports=["exp-none"]), a_body(parent_policy_id="nobody"), a_body(parent_policy_id="id-next")):
        assert told(client.post("/v1/rounds", json=wrong)) == (409, "conflict", None)
    for unknown in ("id-other", "live", "next@1"):
        assert told(client.post("/v1/rounds", json=a_body(child_policy_id=unknown))) == (409, "conflict", "child_policy_id")
    assert live(client) == "id-only"
    assert count(server) == 0
    assert [entry.action for entry in server.store.read(lambda connection: audit.entries(connection, 1))] == ["stage"]
    assert client.post("/v1/chat/completions", json={"model": "live", "messages": [{"role": "user", "content": "a"}]}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"id": "rnd-1"}, "id"),
        ({"promoted": True}, "promoted"),
        ({"promote": 1}, "promote"),
        ({"name": " "}, "name"),
        ({"config_sha256": "c0"}, "config_sha256"),
        ({"git_sha": "HEAD"}, "git_sha"),
        ({"exports": "exp-1"}, "exports"),
        ({"started_at": "2026-05-04T09:00:00"}, "started_at"),
        ({"finished_at": "2026-05-04T06:00:00Z"}, None),
        ({"metrics": {"a": [{"b": float("inf")}]}}, "metrics"),
        ({"metrics": {"a": float("nan")}}, "metrics"),
    ],
)
def test_what_is_wrong_is_named(server: Running, client: httpx.Client, fields: dict[str, Any], param: str | None) -> None:
    response = client.post("/v1/rounds", content=json.dumps(a_body(**fields)), headers={"Content-Type": "application/json"})
    assert told(response) == (400, "invalid_request", param), response.text
    assert count(server) == 0


def test_metrics_that_are_nested_beyond_reason(server: Running, client: httpx.Client) -> None:
    deep: Any = 1
    for _ in range(200):
        deep = [deep]
    assert told(client.post("/v1/rounds", json=a_body(metrics={"a": deep}))) == (400, "invalid_request", "metrics")


def ask(client: httpx.Client, user: str, words: str) -> tuple[str, str]:
    body = {"model": "live", "user": user, "messages": [{"role": "user", "content": words}], "alignkit": {"consent": {"train": True}}}
    answer = client.post("/v1/chat/completions", json=body).json()
    return answer["id"], answer["choices"][0]["alignkit"]["completion_id"]


def test_from_a_thumb_to_the_policy_and_gone(server: Running, client: httpx.Client) -> None:
    inference, completion = ask(client, "jane/doe@example.com", "JANES")
    thumb = {"kind": "comment", "target_type": "completion", "target_id": completion, "value": "JANES answer"}
    one = client.post("/v1/feedback", json=thumb).json()
    data = an_export(server.store, [one["id"]])
    stage(client)
    made = client.post("/v1/rounds", json=a_body(exports=[data.id])).json()
    found = client.get(f"/v1/lineage/feedback/{one['id']}").json()
    assert (found["feedback"]["id"], [each["id"] for each in found["history"]]) == (one["id"], [one["id"]])
    assert found["rows"] == [{"export_id": data.id, "row_no": 0, "feedback_id": one["id"], "weight": 1.0}]
    assert [each["id"] for each in found["exports"]] == [data.id]
    assert found["rounds"] == [made]
    assert [each["name"] for each in found["policies"]] == ["next@1"]
    assert "JANES" not in json.dumps(found)
    of_policy = client.get("/v1/lineage/policy/next@1").json()
    assert of_policy == client.get("/v1/lineage/policy/id-next").json()
    assert (of_policy["feedback"], of_policy["annotators"], of_policy["tainted"]) == ({"comment": 1}, {one["annotator_id"]: 1.0}, [])
    assert [each["id"] for each in of_policy["ancestors"]] == ["id-only"]
    assert told(client.get("/v1/lineage/feedback/fb-none")) == (404, "not_found", "id")
    assert told(client.get("/v1/lineage/policy/none")) == (404, "not_found", "id")

    gone = client.delete("/v1/subjects/jane%2Fdoe@example.com")
    assert gone.status_code == 200, gone.text
    assert gone.json()["counts"] == {"inferences": 1, "completions": 1, "running": 0, "feedback": 1, "tasks": 0, "exports": 1}
    assert [each["path"] for each in gone.json()["exports"]] == [data.path]
    assert gone.json()["rounds"] == [made]
    assert client.get(f"/v1/chat/completions/{inference}").status_code == 404
    assert client.get(f"/v1/feedback/{one['id']}").json()["state"] == "erased"
    assert [each["id"] for each in client.get("/v1/lineage/policy/id-next").json()["tainted"]] == [data.id]
    assert told(client.delete("/v1/subjects/ann-" + "0" * 32)) == (404, "not_found", "id")
    assert client.delete("/v1/subjects/jane%2Fdoe@example.com").json()["counts"]["inferences"] == 0


def test_who_deletes_their_conversation_takes_it_out_of_rounds_to_come(server: Running, client: httpx.Client) -> None:
    inference, completion = ask(client, "jane", "JANES")
    one = client.post("/v1/feedback", json={"kind": "thumb", "target_type": "completion", "target_id": completion, "value": "up"}).json()
    data = an_export(server.store, [one["id"]], name="may")
    stage(client)
    assert client.delete(f"/v1/chat/completions/{inference}").json()["deleted"]
    refused = client.post("/v1/rounds", json=a_body(exports=[data.id]))
    assert "holds what was erased" in refused.json()["error"]["message"]
    assert (refused.status_code, live(client)) == (409, "id-only")


def run(*arguments: str, input: str | None = None) -> str:
    result = CliRunner().invoke(cli, list(arguments), input=input, catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[tuple[str, Store]]:
    """A store on a disk, for commands to open again."""
    url = f"sqlite:///{tmp_path / 'store.db'}"
    with Store.open(url) as store:
        yield url, store


def test_rounds_in_a_terminal(kept: tuple[str, Store]) -> None:
    url, store = kept
    assert "no round in" in run("rounds", "--store", url)
    assert json.loads(run("rounds", "--store", url, "--json")) == []
    a, b, c = (stored_policy(store, name=name) for name in ("sft@1", "ppo@1", "ppo@2"))
    data, held = an_export(store, ["fb"][:0], n_rows=120), an_export(store, n_rows=30, split="holdout")
    prompts = an_export(store, n_rows=400, shape="prompts")
    record(store, a_round(a, b, data, held, prompts, metrics=a_body()["metrics"]))
    record(store, a_round(b, c, name="round-2", promoted=False, metrics={"win_rate": 0.5, "refused_because": "it wins [half]"}))
    shown = run("rounds", "--store", url)
    first, second = (line for line in shown.splitlines() if "round-" in line)
    cells = [cell.strip() for cell in first.split("│")[1:-1]]
    assert cells == ["round-1", "ppo@1", "400 prompts, 120 rankings", "75.0%", "61.0% (55.0% to 67.0%)", "3.20", "promoted"]
    cells = [cell.strip() for cell in second.split("│")[1:-1]]
    assert cells == ["round-2", "ppo@2", "nothing of this server", "-", "50.0% (- to -)", "-", "refused: it wins [half]"]
    assert [each["name"] for each in json.loads(run("rounds", "--store", url, "--json"))] == ["round-1", "round-2"]


def test_lineage_in_a_terminal(kept: tuple[str, Store]) -> None:
    url, store = kept
    one = said(store, a_thumb(one_answer(store)[1], author=a_key(store)))
    a, b = stored_policy(store, name="sft@1"), stored_policy(store, name="ppo@1")
    data = an_export(store, [one.id], name="may")
    record(store, a_round(a, b, data))
    shown = run("lineage", "feedback", one.id, "--store", url)
    for line in (f"thumb {one.id}", f"export may ({data.id}): 1 rankings, train", "row 0", "round round-1", "policy ppo@1 (staged)"):
        assert line in shown, shown
    assert json.loads(run("lineage", "feedback", one.id, "--store", url, "--json"))["rows"][0]["export_id"] == data.id
    shown = run("lineage", "policy", "ppo@1", "--store", url)
    for line in ("came from", "policy sft@1", "1 pieces of feedback", "1 thumb", f"100.0% {one.annotator_id}"):
        assert line in shown, shown
    assert json.loads(run("lineage", "policy", b.id, "--store", url, "--json"))["policy"]["name"] == "ppo@1"
    alone = said(store, a_thumb(one_answer(store)[1]))
    assert "in no export" in run("lineage", "feedback", alone.id, "--store", url)
    for arguments, message in ((("feedback", "fb-none"), "no feedback 'fb-none'"), (("policy", "none"), "there are: ")):
        result = CliRunner().invoke(cli, ["lineage", *arguments, "--store", url])
        assert result.exit_code == 2
        assert message in result.output


def test_erasing_in_a_terminal_takes_the_files_too(kept: tuple[str, Store], tmp_path: Path) -> None:
    url, store = kept
    one = said(store, a_thumb(one_answer(store)[1], author=a_key(store)))
    folders = [tmp_path / "exports" / name for name in ("may", "june")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / ROWS).write_text("texts")
        (folder / "manifest.json").write_text("{}")
    may, june = an_export(store, [one.id], path=str(folders[0])), an_export(store, path=str(folders[1]))
    a, b = stored_policy(store, name="sft@1"), stored_policy(store, name="ppo@1")
    record(store, a_round(a, b, may))
    first = run("erase", one.annotator_id, "--store", url, input="n\n")
    assert "erased: 0 inferences, 0 completions, 1 feedback" in first
    assert "round round-1 was trained on some of it" in first
    assert "policy ppo@1 (staged) saw some of it" in first
    assert str(folders[0] / ROWS) in first
    assert (folders[0] / ROWS).exists()
    # Whoever thought better of it, or was interrupted, asks again.
    assert "removed 1 files" in run("erase", one.annotator_id, "--store", url, "--yes")
    assert [(folder / ROWS).exists() for folder in folders] == [False, True]
    assert (folders[0] / "manifest.json").exists()
    assert "files" not in run("erase", one.annotator_id, "--store", url)
    exports = store.read(lineage.exports)
    assert exports[may.id].tainted_at is not None
    assert exports[june.id].tainted_at is None
