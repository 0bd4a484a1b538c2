"""A run goes on in the world it began in: what has changed is shown and refused, or accepted and noted, or may round differently."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from alignkit.errors import RunError
from alignkit.models import kernels
from tests.faults.conftest import Faults
from tests.faults.running import Project, Traces, events, traces

pytestmark = pytest.mark.slow


@contextmanager
def changed(path: Path, old: str, new: str) -> Iterator[None]:
    """The file with ``new`` for the first ``old``, for a while."""
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))
    try:
        yield
    finally:
        path.write_text(content)


def test_another_config_is_refused_and_can_be_accepted(project: Project, going_on: Path, faults: Faults) -> None:
    faults("another config")
    with pytest.raises(RunError, match=r"was begun with something else:\n  ppo\.optimizer\.clip: 0\.2 -> 0\.3\nput it back, .*--accept-ch"):
        project.go_on(going_on, "ppo.optimizer.clip=0.3")
    project.go_on(going_on, "ppo.optimizer.clip=0.3", accept_changes=True)
    (noted,) = events(going_on, "changes accepted")
    assert noted["changes"] == ["ppo.optimizer.clip: 0.2 -> 0.3"]
    project.go_on(going_on, "ppo.optimizer.clip=0.3")  # It is this run's config now.


def test_changed_rows_are_noticed_by_their_content(project: Project, uninterrupted: Traces, going_on: Path, faults: Faults) -> None:
    faults("a prompt was changed")
    files = {"prompts.jsonl": ["training"], "text.jsonl": ["jsonl_1"], "prompts.heldout.jsonl": ["jsonl_2", "jsonl_3"]}  # select, watch
    for file, keys in files.items():
        listed = "".join(rf'\n  {key}_sha256: "[0-9a-f]{{64}}" -> "[0-9a-f]{{64}}"' for key in keys)
        old = (project.folder / "smoke" / file).read_text().splitlines()[1]
        with (
            changed(project.folder / "smoke" / file, old, old.replace(' is"', ' was"').replace("clock", "watch")),
            pytest.raises(RunError, match=f"stage ppo was begun with something else:{listed}\nput"),
        ):
            project.go_on(going_on)
    project.go_on(going_on)
    assert traces(going_on) == uninterrupted
    assert events(going_on, "changes accepted") == []


def test_more_rows_may_be_accepted(project: Project, uninterrupted: Traces, going_on: Path, faults: Faults) -> None:
    faults("a prompt more")
    with changed(project.folder / "smoke" / "prompts.jsonl", "\n", '\n{"id": "new", "prompt": "The new film is"}\n'):
        with pytest.raises(RunError, match="training_sha256"):
            project.go_on(going_on)
        project.go_on(going_on, accept_changes=True)
    (noted,) = events(going_on, "changes accepted")
    assert noted["what"] == "stage ppo"
    assert traces(going_on) != uninterrupted


def test_another_version_of_a_plugin_is_refused(project: Project, uninterrupted: Traces, going_on: Path, faults: Faults) -> None:
    faults("a plugin was upgraded")
    project.install_plugin("1.1")
    try:
        with pytest.raises(RunError, match=r'plugins\.moody: "acme-moody 1\.0" -> "acme-moody 1\.1"'):
            project.go_on(going_on)
        project.go_on(going_on, accept_changes=True)
    finally:
        project.install_plugin("1.0")
    assert traces(going_on) == uninterrupted


def test_other_threads_and_libraries_are_a_warning(
    project: Project, going_on: Path, faults: Faults, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    faults("two threads, and another torch, which has no oneDNN")
    monkeypatch.setattr(kernels, "_has_onednn", lambda x, weight: False)
    record = json.loads((going_on / "run.json").read_text())
    now = record["libraries"]["torch"]
    record["libraries"] |= {"torch": "2.8.0", "pluggy": "1.0"}
    record["choices"]["cpu"] = "DEFAULT"
    record["choices"]["kernels"]["decode"] = "packed"
    (going_on / "run.json").write_text(json.dumps(record))
    try:
        project.go_on(going_on, "threads=2")
    finally:
        torch.set_num_threads(1)
    said = capsys.readouterr().out
    assert "close, not exact" in said
    (noted,) = events(going_on, "rounds differently")
    found = noted["changes"]
    assert isinstance(found, list)
    assert [change.split(":")[0] for change in found] == ["libraries.torch", "cpu", "kernels.decode", "threads"]
    assert f'libraries.torch: "2.8.0" -> "{now}"' in said
    assert "threads: 1 -> 2" in said


def test_more_steps_than_the_plan_now_has_are_not_gone_on_from(project: Project, going_on: Path) -> None:
    with pytest.raises(RunError, match=r"stage ppo has done [3-7] steps, and now has 2; give it more"):
        project.go_on(going_on, "ppo.optimizer.iterations=2", accept_changes=True)
