"""Counts the faults that tests inject, and those of them after which something was lost: the faults of tests that failed."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.faults.running import TIMEOUT, Project, Traces, log_of, steps, traces, wait_for

INJECTED = pytest.StashKey[list[str]]()
TOLL = pytest.StashKey[list[tuple[int, bool]]]()


class Faults:
    """What a test calls at each fault that it injects."""

    def __init__(self, injected: list[str]) -> None:
        self._injected = injected

    def __call__(self, what: str) -> None:
        self._injected.append(what)
        print(f"fault {len(self._injected)}: {what}")


@pytest.fixture
def faults(request: pytest.FixtureRequest) -> Faults:
    """The test's own count."""
    node: pytest.Item = request.node
    return Faults(node.stash.setdefault(INJECTED, []))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "call" and (injected := item.stash.get(INJECTED, [])):
        item.config.stash.setdefault(TOLL, []).append((len(injected), report.failed))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    toll = config.stash.get(TOLL, [])
    if toll:
        lost = sum(number for number, failed in toll if failed)
        terminalreporter.write_line(f"{sum(number for number, _ in toll)} faults injected, {lost} lost")


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """One for all tests."""
    return Project.make(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def uninterrupted(project: Project) -> Traces:
    """What the run comes to when nothing happens to it."""
    run = project.folder / "uninterrupted"
    assert project.start(run).wait(TIMEOUT) == 0, log_of(run).read_text()
    return traces(run)


@pytest.fixture(scope="session")
def stopped(project: Project, uninterrupted: Traces) -> Path:
    """A run that SIGTERM has stopped in the middle of PPO; a copy of it may be gone on with."""
    run = project.folder / "stopped"
    process = project.start(run, "checkpoint.keep=3")
    assert wait_for(process, lambda: steps(run, "ppo") == 3), log_of(run).read_text()
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT) == 143, log_of(run).read_text()
    return run


@pytest.fixture
def going_on(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(stopped, tmp_path / "run")
