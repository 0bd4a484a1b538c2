"""Runs that are compared to the bit."""

from __future__ import annotations

import json
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
