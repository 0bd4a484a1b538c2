"""Runs that are compared to the bit."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from alignkit.files import sha256
from alignkit.tracking import MetricsFile
from alignkit.types import Metrics


def weights(run: Path) -> dict[str, str]:
    """The hash of everything that the run learnt."""
    return {str(path.relative_to(run)): sha256(path) for path in sorted(run.glob("*/*/*.safetensors"))}


def lines(path: Path) -> list[dict[str, Any]]:
    """A file with a JSON object a line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def learnt(run: Path, stage: str) -> list[dict[str, float]]:
    """The stage's metrics, without wall-clock figures."""
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines(run / stage / "metrics.jsonl")]


def compute_like(run: Path, other: Path) -> None:
    """Let ``run``, which another process will begin with the same config, multiply as ``other`` found to be fastest.

    On a busy machine it might find another way, which rounds differently.
    """
    run.mkdir()
    shutil.copy(other / "run.json", run)


@contextmanager
def ctrl_c(stage: str, step: int) -> Iterator[None]:
    """Within, it is pressed at the end of that step."""
    log = MetricsFile.log

    def interrupted(file: MetricsFile, name: str, done: int, metrics: Metrics) -> None:
        if (name, done) == (stage, step):
            signal.raise_signal(signal.SIGINT)
        log(file, name, done, metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsFile, "log", interrupted)
        yield
