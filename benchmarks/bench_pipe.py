"""Workers that do one step when they are told to: commands and answers are JSON lines in pipes, so that only one side computes at a time.

Standard library alone: peers import it in environments of their own.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class WorkerError(Exception):
    """A worker ended before it answered."""


class Worker:
    """The parent's end: a process that loads its models once and then waits."""

    def __init__(self, python: Path, module: str, settings: Mapping[str, Any], *, log: Path, environment: Mapping[str, str]) -> None:
        self.name = f"{module.rpartition('.')[2]} {settings.get('label', '')}".strip()
        self._log = log
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [python, "-m", module, json.dumps(settings)],
                cwd=ROOT, env={**os.environ, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
            )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """Memory and versions. The first call returns when the worker has loaded everything."""
        return self._ask({"do": "facts"})

    def step(self, **options: Any) -> dict[str, Any]:
        """Do one step; ``seconds`` of the answer is its time. Returns when the worker waits again, its memory added to the answer."""
        answer = self._ask({"do": "step", "options": options})
        return {**answer, **self.facts()}

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the missing answer tells
        line = self._process.stdout.readline()
        if not line:
            words = "\n  ".join(self._log.read_text(errors="replace").strip().splitlines()[-12:])
            raise WorkerError(f"{self.name} ended with {self._process.wait()}:\n  {words}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Gate:
    """The worker's end: ``wait`` returns when the next step is to be done, ``answer`` tells how it went."""

    def __init__(self) -> None:
        # Libraries print; from here on that goes to the log, and the pipe is the protocol's alone.
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.facts: dict[str, Any] = {}

    def wait(self) -> dict[str, Any]:
        """The options of the next step. Does not return when the parent has no more."""
        for line in iter(sys.stdin.readline, ""):
            command = json.loads(line)
            if command["do"] == "step":
                gc.collect()  # in nobody's time
                options: dict[str, Any] = command["options"]
                return options
            self.answer({**memory(), **self.facts})
        # A trainer's loop has no other way out that skips its farewells.
        os._exit(0)

    def answer(self, values: Mapping[str, Any]) -> None:
        """One line to the parent."""
        self._answers.write(json.dumps(values) + "\n")
        self._answers.flush()


def settings() -> dict[str, Any]:
    """What the parent told this worker on its command line."""
    told: dict[str, Any] = json.loads(sys.argv[1])
    return told


def serve(gate: Gate, step: Callable[..., Mapping[str, Any]]) -> None:
    """Answer steps until the parent leaves."""
    while True:
        gate.answer(step(**gate.wait()))


def memory() -> dict[str, float]:
    """Resident memory of this process, now and at its peak, MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split()[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith(("VmHWM", "VmRSS"))}
    return {"peak_mb": found["VmHWM:"], "rss_mb": found["VmRSS:"]}
