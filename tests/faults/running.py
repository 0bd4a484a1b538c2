"""The run that everything happens to, as real processes and in this one, and what must not depend on what happened to it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from alignkit.files import sha256
from alignkit.runner import run_config

HERE = Path(__file__).parent
STAGES = {"sft": 8, "reward": 6, "ppo": 8}
"""Steps of the stages that learn."""
TIMEOUT = 300.0

Traces = dict[str, str]
"""sha256 by name."""


@dataclass(frozen=True)
class Project:
    """Config, data and plugin of the faults, in a folder where they may be changed."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Project:
        shutil.copy(HERE / "faults.yaml", folder)
        shutil.copytree(HERE.parents[1] / "configs" / "smoke", folder / "smoke")
        (folder / "plugin").mkdir()
        shutil.copy(HERE / "plugin" / "moody.py", folder / "plugin")
        project = cls(folder)
        project.install_plugin("1.0")
        return project

    @property
    def plugin(self) -> Path:
        """What is to be on the path."""
        return self.folder / "plugin"

    def install_plugin(self, version: str) -> None:
        """As pip leaves a package."""
        for old in self.plugin.glob("*.dist-info"):
            shutil.rmtree(old)
        about = self.plugin / f"acme_moody-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: acme-moody\nVersion: {version}\n")
        (about / "entry_points.txt").write_text("[alignkit]\nmoody = moody\n")

    def start(self, run: Path, *more: str) -> subprocess.Popen[str]:
        """A process whose output goes to a file beside the run's folder."""
        command = [sys.executable, "-m", "alignkit", "run", str(self.folder / "faults.yaml"), f"dir={run}", *more]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(self.plugin), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        with log_of(run).open("a") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)

    def go_on(self, run: Path, *overrides: str, accept_changes: bool = False) -> None:
        """In this process, which finds the plugin meanwhile: what another one saved."""
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(self.plugin))
            run_config(self.folder / "faults.yaml", [f"dir={run}", *overrides], accept_changes=accept_changes)


def log_of(run: Path) -> Path:
    """What the processes of a run said."""
    return run.with_name(f"{run.name}.log")


def events(run: Path, kind: str) -> list[dict[str, object]]:
    """Those of one kind."""
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def traces(run: Path) -> Traces:
    """Weights, figures (rewards tell the order of samples) and what was selected, of every stage."""
    found = {}
    for stage in STAGES:
        manifest = json.loads((run / stage / "manifest.json").read_text())
        artifact = run / stage / manifest["makes"]
        found |= {f"{stage} {path.name}": sha256(path) for path in sorted(artifact.glob("*.safetensors"))}
        lines = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
        found[f"{stage} figures"] = _digest(
            [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]
        )
        found[f"{stage} selection"] = _digest(manifest.get("selection"))
    return found | {"compare": _digest(json.loads((run / "compare" / "evaluation.json").read_text()))}


def steps(run: Path, stage: str) -> int:
    """How many steps of the stage are written down."""
    path = run / stage / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def hidden(folder: Path) -> list[str]:
    """What is being written there, or removed."""
    try:
        return [name for name in os.listdir(folder) if name.startswith((".tmp-", ".del-"))]
    except FileNotFoundError:
        return []


def wait_for(process: subprocess.Popen[str], moment: Callable[[], bool]) -> bool:
    """Whether the moment came before the process ended."""
    until = time.monotonic() + TIMEOUT
    while process.poll() is None:
        if moment():
            return True
        assert time.monotonic() < until, "the moment did not come"
        time.sleep(0.0002)
    return False


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
