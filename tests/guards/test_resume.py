"""What the guards have seen is in the checkpoints: a run goes on as if it had not been stopped, and with any of it left out it does not."""

from __future__ import annotations

import json
import math
import random
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import alignkit
from alignkit.checkpoint import load_checkpoint, save_checkpoint
from alignkit.config.schema import GuardConfig
from alignkit.errors import Interrupted, Stopped
from alignkit.guards.guard import Guard
from alignkit.guards.watch import Watch
from alignkit.interfaces import Rollout, ScoredRollout, State, TokenBatch
from alignkit.tracking import EventLog
from alignkit.types import Message, Metrics, Prompt, Sample, Score
from tests.guards.test_runs import config, failing_twice, guarded, ppo, prompts
from tests.runs import ctrl_c, learnt


def leave_out(run: Path, part: str, **values: Any) -> None:
    """In the newest checkpoint, as they are at the beginning of a stage."""
    folder = run / "ppo" / "checkpoints"
    saved = load_checkpoint(folder, print)
    assert saved is not None
    state = saved.states[part]
    assert all(state.values[name] != value for name, value in values.items()), "nothing is left out"
    save_checkpoint(folder, saved.step, {**saved.states, part: State(state.tensors, {**state.values, **values})}, keep=2)


def go_on(file: Path, run: Path) -> list[dict[str, float]]:
    """To the end, however it ends."""
    with suppress(Stopped):
        alignkit.run(file, [f"dir={run}"])
    return learnt(run, "ppo")


@pytest.mark.parametrize(
    ("step", "left_out"),
    # Of nine steps 3, 4 and 5 fail, and are done again from 3 on: 4 ends twice.
    [(4, {"skipped": []}), (6, {"rate": 1.0})],
    ids=["the skipped steps", "the rate"],
)
def test_what_was_skipped_and_how_fast_a_stage_learns(tmp_path: Path, step: int, left_out: dict[str, Any]) -> None:
    file = failing_twice(tmp_path, set())
    whole = go_on(file, tmp_path / "whole")
    with ctrl_c("ppo", step), pytest.raises(Interrupted, match=f"is saved after step {step}"):
        alignkit.run(file, [f"dir={tmp_path / 'run'}"])
    shutil.copytree(tmp_path / "run", tmp_path / "without")
    assert go_on(file, tmp_path / "run") == whole
    leave_out(tmp_path / "without", "guard", **left_out)
    assert go_on(file, tmp_path / "without") != whole


def test_for_how_long_the_kl_was_out_of_bounds(tmp_path: Path) -> None:
    stage = ppo(tmp_path, "repetition", prompts(72), iterations=60, learning_rate=1e-2, epochs=2, kl={"coef": 0.0, "stop": 2.0})
    file = config(tmp_path, stage)
    whole = go_on(file, tmp_path / "whole")
    assert [event["what"] for event in guarded(tmp_path / "whole")][-1] == "kl"
    with ctrl_c("ppo", len(whole) - 1), pytest.raises(Interrupted):
        alignkit.run(file, [f"dir={tmp_path / 'run'}"])
    shutil.copytree(tmp_path / "run", tmp_path / "without")
    assert go_on(file, tmp_path / "run") == whole
    leave_out(tmp_path / "without", "optimizer", kl_beyond=0)
    assert len(go_on(file, tmp_path / "without")) > len(whole)


class Entropy:
    """An optimizer of which only the entropy is known."""

    policy: Any = None

    def __init__(self) -> None:
        self.value = 2.0

    def update(self, batch: ScoredRollout) -> Metrics:
        self.value *= 0.97
        return {"policy/entropy_nats": self.value}

    def save(self, folder: Path) -> None:
        folder.mkdir()

    def state(self) -> State:
        return State(values={"value": self.value})

    def load_state(self, state: State) -> None:
        self.value = state.values["value"]


def scored(step: int) -> ScoredRollout:
    """Sixteen responses with rewards of 17 digits; to some of them nobody had anything to say, and one is no number."""
    draw = random.Random(step)
    lengths = [draw.randint(1, 9) for _ in range(16)]
    ids = torch.tensor([[draw.randint(5, 9) for _ in range(10)] for _ in lengths])
    mask = torch.arange(10) < torch.tensor(lengths)[:, None]
    samples = tuple(Sample(Prompt(f"p{i}", (Message("user", "?"),)), "", finished=draw.random() < 0.7) for i in range(16))
    values = [None if draw.random() < 0.2 else draw.random() * length for length in lengths]
    scores = (*(Score(value, reason=None if value else "nobody answered") for value in values[:-1]), Score(math.nan))
    rollout = Rollout(samples, TokenBatch(ids, torch.ones_like(mask), mask), torch.zeros(ids.shape), True, 0)
    return ScoredRollout(rollout, scores)


@pytest.mark.parametrize("stopped_after", [1, 2, 3, 20, 39, 45])
def test_all_that_was_watched(tmp_path: Path, stopped_after: int) -> None:
    def watch() -> tuple[Watch, Entropy]:
        optimizer = Entropy()
        guard = Guard("ppo", GuardConfig(), "", [].append, EventLog(tmp_path / "events.jsonl"))
        return Watch(optimizer, guard, None), optimizer

    first, optimizer = watch()
    figures = [first.update(scored(step)) for step in range(stopped_after)]
    second, other = watch()
    second.load_state(State(values=json.loads(json.dumps(dict(first.state().values)))))
    other.load_state(optimizer.state())
    for step in range(stopped_after, 50):  # the window of 512 rewards is full after about 40
        figures.append(second.update(scored(step)))
        assert first.update(scored(step)) == figures[-1]
    assert second.state() == first.state()
    assert all("guard/reward_std" in each for each in figures[3:])
