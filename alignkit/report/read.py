"""What a run left on disk, read back for the report; stages that have not happened yet are simply not there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.errors import RunError

Points = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class StageRecord:
    """One stage: its manifest (empty until it is finished), its metrics by name as (step, value), its evaluation if it was one."""

    name: str
    folder: Path
    manifest: Mapping[str, Any]
    metrics: Mapping[str, Points]
    evaluation: Mapping[str, Any]

    @property
    def artifact(self) -> Path | None:
        """Where the stage's policy or reward model is."""
        made = self.manifest.get("makes")
        return self.folder / made if made in ("policy", "reward_model") else None


@dataclass(frozen=True, slots=True)
class Warned:
    """What a guard said: where and when, what it is called, its figure if it has one, and its words."""

    stage: str
    step: int
    what: str
    figure: float | None
    text: str


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run's folder, read. ``about`` is ``run.json``."""

    folder: Path
    about: Mapping[str, Any]
    stages: tuple[StageRecord, ...]
    warnings: tuple[Warned, ...] = ()

    @property
    def name(self) -> str:
        """As the config names it."""
        return str(self.about["config"].get("name", self.folder.name))

    @property
    def comparison(self) -> Mapping[str, Any]:
        """The last evaluation that holds a win rate; empty if there is none."""
        found = [stage.evaluation for stage in self.stages if "win_rate" in stage.evaluation]
        return found[-1] if found else {}


def read_run(folder: Path) -> RunRecord:
    """Read the run in ``folder``. Raises ``RunError`` when there is none, or when a file of it is damaged."""
    if not (folder / "run.json").is_file():
        raise RunError(f"{folder} holds no run: there is no run.json in it; give the folder that `dir:` names in the config")
    about = _json(folder / "run.json")
    names = [stage["name"] for stage in about["config"].get("stages", ())]
    return RunRecord(
        folder, about, tuple(_stage(folder / name) for name in names if (folder / name).is_dir()), _warnings(folder / "events.jsonl")
    )


def _stage(folder: Path) -> StageRecord:
    manifest = _json(folder / "manifest.json") if (folder / "manifest.json").is_file() else {}
    evaluation = _json(folder / "evaluation.json") if (folder / "evaluation.json").is_file() else {}
    return StageRecord(folder.name, folder, manifest, _metrics(folder / "metrics.jsonl"), evaluation)


def _warnings(path: Path) -> tuple[Warned, ...]:
    """The guards' events, in order; what a run that went on told again is told once."""
    told = [
        Warned(row["stage"], row["step"], row["what"], row.get("figure"), row["text"]) for row in _rows(path) if row.get("event") == "guard"
    ]
    return tuple(dict.fromkeys(told))


def _metrics(path: Path) -> dict[str, Points]:
    metrics: dict[str, Points] = {}
    for row in _rows(path):
        for name, value in row.items():
            if "/" in name and isinstance(value, int | float) and math.isfinite(value):
                metrics.setdefault(name, []).append((float(row["step"]), float(value)))
    return metrics


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file that is written a line at a time."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # A killed run may leave half a line.
                return
            raise RunError(f"{path}:{number}: not a line of JSON: {error}") from error
        yield row


def _json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RunError(f"{path}: not JSON: {error}") from error
    return found
