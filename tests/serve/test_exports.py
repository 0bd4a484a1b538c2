"""Exports from where people ask for them: a run's config, the command line, and HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from alignkit.api import DataSource
from alignkit.cli import cli
from alignkit.config import load_config
from alignkit.data.records import rankings
from alignkit.registry import find_plugins
from alignkit.testing import DataSourceConformance
from alignkit.testing.settings import parsed, refusal
from alignkit_serve.dataset.filters import Filters
from alignkit_serve.export_commands import export_command
from alignkit_serve.feedback_data import FEEDBACK, FeedbackConfig
from alignkit_serve.routes.exports import ExportRequest
from alignkit_serve.store import Store
from tests.serve.fakes import ScriptedEngine, scripted
from tests.serve.running import Running, running
from tests.serve.store.rows import stored_policy
from tests.serve.store.test_exports import asked, opine

REGISTRY = find_plugins()
LOOSE = {"probation": 0, "burst": 0}


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store with a ranking of three and a thumb, in the working directory."""
    monkeypatch.chdir(tmp_path)
    with Store.open("sqlite:///alignkit.db") as store:
        fill(store)
    return "sqlite:///alignkit.db"


def fill(store: Store) -> None:
    made, (a, b, c) = asked(store, stored_policy(store), "Why?", "A", "B", "C")
    opine(store, "ranking", made.id, [[b.id], [a.id, c.id]], on="inference")
    opine(store, "thumb", a.id, "up")


def config(**changes: Any) -> dict[str, Any]:
    return {"store": "sqlite:///alignkit.db", "export": "round-1", "shape": "rankings", "split": "all", **LOOSE, **changes}


@pytest.mark.usefixtures("url")
def test_a_run_reads_feedback_as_data_and_the_same_again_though_more_came(tmp_path: Path) -> None:
    settings = parsed(DataSource, "feedback", config(), REGISTRY)
    source = FEEDBACK.build(settings)
    assert not (tmp_path / "exports").exists()  # checking a config makes nothing
    first = list(source.rows())
    with Store.open("sqlite:///alignkit.db") as store:
        fill(store)
    assert list(source.rows()) == list(FEEDBACK.build(settings).rows()) == first
    (ranking,) = rankings(first)
    assert (ranking.responses, ranking.ranks, ranking.weight) == (("B", "A", "C"), (1, 2, 2), 1.0)
    assert ranking.prompt.messages[0].content == "Why?"
    assert first[0].origin.endswith("rows.parquet row 1")


class TestFeedbackSource(DataSourceConformance):
    """The kit for data sources."""

    spec = FEEDBACK
    wrong = ({"export": "../x"}, {"shape": "pairs"}, {"rating_gap": 1}, {"since": "May"}, {"folder": 3})

    @pytest.fixture(autouse=True)
    def _stored(self, url: str, tmp_path: Path) -> None:
        places = {"store": f"sqlite:///{tmp_path / 'alignkit.db'}", "folder": str(tmp_path / "exports")}
        self.config = FeedbackConfig(**config(**places))


@pytest.mark.usefixtures("url")
def test_paths_are_those_of_the_working_directory_or_of_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "away").mkdir()
    (tmp_path / "run.yaml").write_text(
        "name: x\npolicy: {kind: tiny_lm}\nstages:\n  - name: reward\n    optimizer: {kind: reward_model}\n"
        "    data: {kind: feedback, store: 'sqlite:///alignkit.db', export: one, shape: rankings}\n"
    )
    monkeypatch.chdir(tmp_path / "away")
    data = load_config(tmp_path / "run.yaml", (), REGISTRY).run.stages[0].data
    assert data is not None
    assert data.config.store == f"sqlite:///{tmp_path / 'alignkit.db'}"
    assert parsed(DataSource, "feedback", config(store=data.config.store, folder="new"), REGISTRY).folder == str(tmp_path / "away" / "new")


@pytest.mark.usefixtures("url")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"store": "sqlite:///alignkit.bd"}, 'is "alignkit.bd": no such file here or beside the config'),
        ({"store": "sqlite:///"}, 'is "sqlite:///"; allowed: sqlite:///PATH, of a database that is there'),
        ({"store": "postgresql://me:secret@db/x"}, "store holds a password, which the run would keep"),
        ({"export": "../x"}, 'export is "../x"; allowed: up to 64 letters'),
        ({"shape": "pairs"}, 'is "pairs"; allowed: demonstrations, rankings, comparisons, labels, prompts'),
        ({"kinds": ["comment"]}, 'kinds names "comment"; allowed: thumb, rating'),
        ({"annotator_share": 0.0}, "allowed: a number above 0 and at most 1"),
        ({"since": "May"}, 'since is "May"; allowed: a time such as 2026-05-01'),
        ({"folder": ""}, "allowed: the path of a file or folder"),
    ],
)
def test_mistakes_in_a_config_are_told_before_anything_runs(change: dict[str, Any], message: str) -> None:
    assert message in (refusal(DataSource, "feedback", config(**change), REGISTRY) or "nothing")


def command(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(cli, arguments, prog_name="alignkit")
    assert done.exit_code == code, done.output
    return done.output


@pytest.mark.usefixtures("url")
def test_the_command_prints_what_came_of_it_and_where_it_is() -> None:
    said = command("export", "first", "--shape", "labels", "--split", "all", "--probation", "0")
    *table, folder = said.splitlines()
    assert [line.split() for line in table] == [["rows", "1"], ["feedback", "in", "them", "1"], ["annotators", "disagree", "0"]]
    assert (Path(folder) / "rows.parquet").is_file()
    assert command("export", "first", "--shape", "labels", "--split", "all", "--probation", "0") == said
    assert "was made with other filters: there probation is 0, not 20" in command(
        "export", "first", "--shape", "labels", "--split", "all", code=2
    )
    assert "would have no rows: of the feedback, 1 probation" in command("export", "other", "--shape", "rankings", "--split", "all", code=2)
    assert "up to 64 letters" in command("export", "a/b", "--shape", "labels", code=2)


@pytest.mark.usefixtures("url")
def test_the_command_puts_feedback_into_quarantine_and_out_again() -> None:
    with Store.open("sqlite:///alignkit.db") as store:
        _, (a,) = asked(store, stored_policy(store), "Who?", "A")
        id = opine(store, "thumb", a.id, "down").id
    assert command("quarantine", id, "fb-x", "--reason", "a script wrote it") == "1 of 2 in quarantine now\n"
    assert command("quarantine", id, "--release") == "1 of 1 released\n"
    assert "give either --reason or --release" in command("quarantine", id, code=2)


@pytest.fixture
def server(database_url: str, tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path / "only", database_url, load=scripted(only=ScriptedEngine())) as started:
        fill(started.store)
        yield started


def test_exports_over_http(server: Running, tmp_path: Path) -> None:
    body = {"name": "first", "shape": "comparisons", "split": "all", **LOOSE}
    with server.http("export") as client:
        made = client.post("/v1/exports", json=body).json()
        assert (made["object"], made["n_rows"], made["counts"]["feedback"]["kept"], made["tainted_at"]) == ("export", 2, 1, None)
        assert Path(made["path"]).is_relative_to(tmp_path / "exports" / "first")
        assert client.post("/v1/exports", json=body).json() == made
        assert client.get("/v1/exports").json() == {"object": "list", "data": [made]}
        assert client.get(f"/v1/exports/{made['id']}").json() == made
        assert client.get("/v1/exports/exp-x").status_code == 404
        other = client.post("/v1/exports", json={**body, "probation": 20})
        assert (other.status_code, other.json()["error"]["code"]) == (409, "conflict")
        for wrong in (
            {"name": "../x"},
            {"shape": "pairs"},
            {"folder": "/etc"},
            {"rating_gap": 1},
            {"since": "May"},
            {"kinds": ["comment"]},
        ):
            refused = client.post("/v1/exports", json={**body, **wrong})
            assert (refused.status_code, set(refused.json()["error"])) == (400, {"message", "type", "param", "code"})
    for scopes in (("infer", "feedback:read", "feedback:write", "label", "admin"), ("infer",)):
        with server.http(*scopes) as client:
            assert client.get("/v1/exports").status_code == 403


def test_every_filter_is_a_field_of_the_request_and_an_option_of_the_command() -> None:
    names = {*Filters.names()}
    assert names | {"name", "shape", "split"} == {*ExportRequest.model_fields}
    assert names <= {parameter.name for parameter in export_command().params}
