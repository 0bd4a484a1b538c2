"""Disks that are full or closed while a run runs: it says so and goes on for a while, and what was saved leads to the same end."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Faults
from tests.faults.running import TIMEOUT, Project, Traces, events, log_of, traces, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of six megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", place], check=False).returncode:
        pytest.skip("a small disk cannot be mounted here: that needs root")
    yield place
    # Lazily: this process may still have a model of it in its memory.
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(path: Path) -> None:
    """To the last byte."""
    with path.open("wb", buffering=0) as ballast:
        try:
            while ballast.write(bytes(4096)):
                pass
        except OSError:
            return


def test_a_disk_that_fills_up(
    project: Project, uninterrupted: Traces, stopped: Path, small_disk: Path, tmp_path: Path, faults: Faults
) -> None:
    run = small_disk / "run"
    shutil.copytree(stopped, run)
    process = project.start(run)
    assert wait_for(process, lambda: "ppo: continuing" in log_of(run).read_text()), log_of(run).read_text()
    fill(small_disk / "ballast")
    faults("the disk is full in ppo")
    assert process.wait(TIMEOUT) == 74, log_of(run).read_text()
    (small_disk / "ballast").unlink()
    project.go_on(run)
    assert traces(run) == uninterrupted


def test_a_folder_that_becomes_read_only(project: Project, uninterrupted: Traces, stopped: Path, small_disk: Path, faults: Faults) -> None:
    run = shutil.copytree(stopped, small_disk / "run")
    checkpoints = run / "ppo" / "checkpoints"
    for newer in sorted(checkpoints.glob("step-*"))[1:]:
        shutil.rmtree(newer)
    process = project.start(run)
    assert wait_for(process, lambda: "ppo: continuing" in log_of(run).read_text()), log_of(run).read_text()
    # Whoever runs as root is stopped by nothing less.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", checkpoints], check=True)
    faults("the folder of checkpoints became read-only")
    ended = process.wait(TIMEOUT)
    subprocess.run(["umount", checkpoints], check=True)
    said = log_of(run).read_text()
    assert ended == 74, said
    assert said.count("not saved after step ") == 2
    assert "error: 3 times in a row, now after step " in said
    assert "the file system is read-only" in said
    assert said.endswith("what was saved before is intact: repair this and run the same command again\n")
    assert len(events(run, "save failed")) == 2
    project.go_on(run)
    assert traces(run) == uninterrupted
