"""Checkpoints damaged between two starts of a run: the one before is taken, and where there is none, nothing goes on by itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.errors import CheckpointError
from tests.faults.conftest import Faults
from tests.faults.running import Project, Traces, traces
from tests.test_checkpoint import flip_a_bit

pytestmark = pytest.mark.slow

DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda new: os.truncate(new / "optimizer.safetensors", 5000), "optimizer.safetensors has 5000 bytes instead of"),
    "a flipped bit": (lambda new: flip_a_bit(new / "optimizer.safetensors"), "optimizer.safetensors is not what was written"),
    "missing": (lambda new: (new / "generators.safetensors").unlink(), "generators.safetensors is missing"),
    "no manifest": (lambda new: (new / "manifest.json").unlink(), "it has no manifest.json"),
}


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "ppo" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_checkpoint_before_leads_to_the_same_end(
    project: Project, uninterrupted: Traces, going_on: Path, damage: str, faults: Faults, capsys: pytest.CaptureFixture[str]
) -> None:
    faults(f"newest checkpoint: {damage}")
    before, newest = checkpoints(going_on)[-2:]
    harm, reason = DAMAGE[damage]
    harm(newest)
    project.go_on(going_on)
    said = capsys.readouterr().out
    assert f"checkpoint {newest} is broken: {reason}" in said
    assert f"it was set aside as broken-{newest.name}" in said
    assert f"ppo: continuing after step {int(before.name.removeprefix('step-'))}" in said
    assert traces(going_on) == uninterrupted


def test_where_all_are_damaged_nothing_begins_anew_by_itself(project: Project, going_on: Path, faults: Faults) -> None:
    for folder in checkpoints(going_on):
        faults(f"{folder.name} truncated")
        os.truncate(folder / "state.json", 1)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be trusted .*--fresh") as refused:
        project.go_on(going_on)
    assert refused.value.exit_code == 2
    assert not (going_on / "ppo" / "manifest.json").exists()
    assert len(list((going_on / "ppo" / "checkpoints").glob("broken-*"))) == 3
