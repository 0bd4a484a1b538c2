"""Signals, and a second process in the folder."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.faults.conftest import Faults
from tests.faults.running import TIMEOUT, Project, Traces, events, log_of, steps, traces, wait_for

pytestmark = pytest.mark.slow


def test_a_second_process_is_refused_and_a_signal_stops_the_first_for_a_while(
    project: Project, uninterrupted: Traces, tmp_path: Path, faults: Faults
) -> None:
    run, log = tmp_path / "run", log_of(tmp_path / "run")
    first = project.start(run)
    assert wait_for(first, lambda: steps(run, "sft") >= 1)
    first.send_signal(signal.SIGSTOP)  # it holds the folder, and does not finish meanwhile
    faults("two processes in one folder")
    assert project.start(run).wait(TIMEOUT) == 2
    assert f"another process is running in {run}; wait for it, or choose another folder with dir=PATH" in log.read_text()
    first.send_signal(signal.SIGCONT)
    assert wait_for(first, lambda: steps(run, "reward") >= 2)
    faults("Ctrl-C in reward")
    first.send_signal(signal.SIGINT)
    assert first.wait(TIMEOUT) == 130
    assert "stopped: stage reward is saved after step " in log.read_text()
    assert "The same command continues it." in log.read_text()
    project.go_on(run)
    assert traces(run) == uninterrupted
    assert [event["stage"] for event in events(run, "stage continued")] == ["reward"]


def test_a_second_signal_does_not_wait_for_anything(project: Project, uninterrupted: Traces, tmp_path: Path, faults: Faults) -> None:
    run, log = tmp_path / "run", log_of(tmp_path / "run")
    process = project.start(run)
    assert wait_for(process, lambda: steps(run, "sft") >= 2)
    process.send_signal(signal.SIGTERM)
    while "once more to stop at once" not in log.read_text() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    faults("SIGTERM twice")
    assert process.wait(TIMEOUT) in (-signal.SIGTERM, 143)  # The step may have ended between the two.
    project.go_on(run)
    assert traces(run) == uninterrupted
