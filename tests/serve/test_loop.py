"""The loop, closed twice by real processes: served, judged over HTTP, trained, gated, promoted, served."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def alignkit(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "alignkit", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.slow
def test_two_rounds_of_peoples_judgements_make_a_policy_that_they_like_better_twice(tmp_path: Path) -> None:
    loop, results = tmp_path / "loop", tmp_path / "results.json"
    command = [sys.executable, str(ROOT / "examples/rounds/run.py"), str(loop), "--tiny", "--results", str(results)]
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

    # Which feedback the policy is made of is known, and of feedback which policies saw it.
    learnt = json.loads(alignkit("lineage", "policy", second["child_policy_id"], "--json", cwd=loop).stdout)
    assert [policy["id"] for policy in learnt["ancestors"]] == [first["child_policy_id"], first["parent_policy_id"]]
    assert learnt["feedback"].keys() == {"ranking"}
    author = max(learnt["annotators"], key=learnt["annotators"].get)

    # What one of them said is erased, and with it goes the right to train on what it was part of.
    assert alignkit("erase", author, "--yes", cwd=loop).returncode == 0
    refused = alignkit("run", str(ROOT / "examples/rounds/next_round_tiny.yaml"), "name=round-2", "dir=runs/again", cwd=loop)
    assert refused.returncode == 2
    assert "the export 'round-2' of rankings, train, is tainted since" in refused.stderr
