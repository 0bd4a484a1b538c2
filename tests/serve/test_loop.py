"""The loop, closed twice by real processes: served, judged over HTTP, trained, gated, promoted, served."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_rounds_of_peoples_judgements_make_a_policy_that_they_like_better_twice(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    command = [sys.executable, str(ROOT / "examples/rounds/run.py"), str(tmp_path / "loop"), "--tiny", "--results", str(results)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = json.loads(results.read_text())
    assert (first["name"], second["name"]) == ("round-1", "round-2")
    for one in (first, second):
        assert one["promoted"], one
        assert one["metrics"]["ci95_low"] > 0.5
    assert second["parent_policy_id"] == first["child_policy_id"]
    assert second["metrics"]["kl_first_nats"] > second["metrics"]["kl_sequence_nats"] > 0
    # Once more there is nothing left to do.
    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert again.returncode == 0, again.stdout + again.stderr
    assert json.loads(results.read_text()) == [first, second]
