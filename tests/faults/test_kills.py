"""Killed at any moment, and started again until it is done, a run is the run that nobody disturbed. ALIGNKIT_FAULTS says how many kills."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.faults.conftest import Faults
from tests.faults.running import STAGES, TIMEOUT, Project, Traces, hidden, log_of, steps, traces, wait_for

KILLS = int(os.environ.get("ALIGNKIT_FAULTS", "6"))
A_RUN = 10
"""Kills of one run at most."""

Moment = tuple[str, Callable[[], bool]]


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_is_the_same_run(
    project: Project, uninterrupted: Traces, tmp_path: Path, faults: Faults
) -> None:
    draw = random.Random(5)
    kills = writing = number = 0
    # As many more as it takes to hit something that is being written: how fast the disk is does not decide the test.
    while (kills < KILLS or not writing) and number < 3 * KILLS:
        number += 1
        run = tmp_path / f"run-{number}"
        for name, moment in moments(run, draw, min(A_RUN, KILLS)):
            process = project.start(run)
            if not wait_for(process, moment):
                assert process.returncode == 0, log_of(run).read_text()
                break
            process.kill()
            assert process.wait(TIMEOUT) == -signal.SIGKILL
            faults(f"SIGKILL in run {number} {name}, {halves(run) or 'nothing half written'}")
            kills, writing = kills + 1, writing + bool(halves(run))
        assert project.start(run).wait(TIMEOUT) == 0, log_of(run).read_text()
        assert traces(run) == uninterrupted
        assert not halves(run)
        assert "Traceback" not in log_of(run).read_text()
        assert "broken" not in log_of(run).read_text()
    print(f"{kills} kills, {writing} while something was being written")
    assert writing


def moments(run: Path, draw: random.Random, number: int) -> Iterator[Moment]:
    """So many, spread over the stages, in their order: after a step, in a checkpoint, in an artifact, or while the process starts."""
    every = [(stage, step) for stage, total in STAGES.items() for step in range(1, total)]
    targets = sorted(draw.sample(range(len(every)), number))
    kinds = draw.sample(["step", "save", "save", "artifact", "start"], 5)
    for i, target in enumerate(targets):
        stage, step = every[target]
        kind = kinds[i % len(kinds)]
        if kind == "step":
            yield f"after step {step} of {stage}", _later(partial(_has_done, run, stage, step), draw.uniform(0.0, 0.3))
        elif kind == "save":
            yield f"in a checkpoint from step {step} of {stage} on", partial(_saves, run, stage, step)
        elif kind == "artifact":
            yield (
                f"in the artifact or a candidate of {stage}",
                lambda stage=stage: bool(hidden(run / stage) or hidden(run / stage / "candidates")),
            )
        else:
            yield "while it starts", _later(lambda: True, draw.uniform(0.0, 6.0))


def halves(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for name in (".tmp-*", ".del-*") for path in run.rglob(name))


def _has_done(run: Path, stage: str, step: int) -> bool:
    return steps(run, stage) >= step


def _saves(run: Path, stage: str, step: int) -> bool:
    return steps(run, stage) >= step and bool(hidden(run / stage / "checkpoints"))


def _later(moment: Callable[[], bool], seconds: float) -> Callable[[], bool]:
    """``seconds`` after ``moment`` came."""
    came: list[float] = []

    def asked() -> bool:
        if not came and moment():
            came.append(time.monotonic())
        return bool(came) and time.monotonic() - came[0] >= seconds

    return asked
