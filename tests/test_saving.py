"""When the disk refuses a checkpoint: the run goes on twice, and what is saved counts for all that was done before."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignkit.config.schema import CheckpointConfig, GuardConfig
from alignkit.errors import CheckpointError, SaveError
from alignkit.guards.guard import Guard
from alignkit.interfaces import State
from alignkit.models.config import TuningConfig
from alignkit.saving import Saves
from alignkit.testing import example_batch, make_context
from alignkit.tracking import EventLog, MetricsFile
from alignkit.types import Plan
from alignkit_sft import SFTConfig
from alignkit_sft import register_optimizers as sft
from tests.fakes import tiny_policy


class Count:
    """A part: so many steps done."""

    def __init__(self) -> None:
        self.done = 0
        self.weights = torch.zeros(3)

    def state(self) -> State:
        return State({"weights": self.weights + self.done}, {"done": self.done})

    def load_state(self, state: State) -> None:
        self.done = state.values["done"]
        self.weights.copy_(state.tensors["weights"] - self.done)


def saves(folder: Path, said: list[str], *, minutes: float = 0.0, **parts: Any) -> Saves:
    metrics = MetricsFile(folder / "metrics.jsonl")
    metrics.log("sft", 1, {})
    events = EventLog(folder / "events.jsonl")
    guard = Guard("sft", GuardConfig(), "", said.append, events)
    return Saves(folder / "checkpoints", parts, metrics, CheckpointConfig(minutes=minutes), said.append, events, guard)


def block(folder: Path) -> Path:
    """Nothing can be written where a file is in the way."""
    (folder / "checkpoints").touch()
    return folder / "checkpoints"


def test_two_failures_are_said_and_the_third_ends_the_run(tmp_path: Path) -> None:
    said: list[str] = []
    stage = saves(tmp_path, said, count=Count())
    block(tmp_path)
    stage.attempt(1)
    stage.attempt(2)
    assert [text.split(":")[0] for text in said] == [
        f"not saved after step {step}, and going on; 3 times in a row would end the run" for step in (1, 2)
    ]
    assert all("File exists" in text and "run the same command" not in text for text in said)
    with pytest.raises(SaveError, match=r"3 times in a row, now after step 3: .*File exists.*; what was saved before is intact") as stopped:
        stage.attempt(3)
    assert stopped.value.exit_code == 74
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(event["event"], event["step"]) for event in events] == [("save failed", 1), ("save failed", 2)]


def test_a_save_that_works_forgives_those_that_did_not(tmp_path: Path) -> None:
    said: list[str] = []
    stage = saves(tmp_path, said, count=Count())
    for step in range(1, 10):
        blocked = block(tmp_path) if step % 3 else None
        stage.attempt(step)
        if blocked:
            blocked.unlink()
        else:
            (tmp_path / "checkpoints").rename(tmp_path / f"saved-{step}")
    assert len(said) == 6


def test_the_last_save_before_a_stop_is_not_forgiven(tmp_path: Path) -> None:
    block(tmp_path)
    with pytest.raises(SaveError, match=r"stopped, and not saved after step 7: .*File exists"):
        saves(tmp_path, [], count=Count()).final(7)


def test_figures_that_are_not_on_the_disk_hold_a_checkpoint_back(tmp_path: Path) -> None:
    said: list[str] = []
    stage = saves(tmp_path, said, count=Count())
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    stage.attempt(1)
    assert "metrics.jsonl cannot be written" in said[0]
    assert not (tmp_path / "checkpoints").exists()


def test_it_is_due_when_the_minutes_have_passed(tmp_path: Path) -> None:
    assert saves(tmp_path, [], minutes=0.0).due()
    assert not saves(tmp_path, [], minutes=10.0).due()


def test_what_was_saved_is_taken_up_in_the_order_of_the_parts(tmp_path: Path) -> None:
    first, second = Count(), Count()
    first.done, second.done = 5, 6
    saves(tmp_path, [], first=first, second=second).final(5)
    again = {"first": Count(), "second": Count()}
    assert saves(tmp_path, [], **again).resume() == 5
    assert [part.done for part in again.values()] == [5, 6]


def test_a_checkpoint_that_does_not_fit_is_named_and_left_alone(tmp_path: Path) -> None:
    saves(tmp_path, [], count=Count()).final(5)
    with pytest.raises(CheckpointError, match=r"the state of 'other' after step 5 in .* does not fit \('other'\); go on with the config"):
        saves(tmp_path, [], other=Count()).resume()
    wider = Count()
    wider.weights = torch.zeros(4)
    with pytest.raises(CheckpointError, match=r"the state of 'count' .* does not fit \(The size of tensor"):
        saves(tmp_path, [], count=wider).resume()
    assert (tmp_path / "checkpoints" / "step-00000005").is_dir()


def test_a_checkpoint_of_adapters_holds_no_weight_of_the_model(tmp_path: Path) -> None:
    context = make_context(tmp_path, plan=Plan(steps=3, rows=4))
    policy = tiny_policy(tuning=TuningConfig(kind="lora", rank=2))
    spec = sft()[0]
    optimizer = spec.build(SFTConfig(batch=4), replace(context, checks=False, load_policy=lambda stage, trainable: policy))
    optimizer.update(example_batch("demonstrations", policy))
    saves(tmp_path, [], optimizer=optimizer).final(1)
    file = tmp_path / "checkpoints" / "step-00000001" / "optimizer.safetensors"
    tensors = load_file(file)
    assert tensors
    assert all(".lora_A." in name or ".lora_B." in name for name in tensors)
    adapters = sum(weight.numel() for weight in policy.module.parameters() if weight.requires_grad)
    everything = sum(weight.numel() for weight in policy.module.parameters())
    kinds = ("weight/", "adam.exp_avg/", "adam.exp_avg_sq/")
    held = {kind: sum(tensor.numel() for name, tensor in tensors.items() if name.startswith(kind)) for kind in kinds}
    assert held == dict.fromkeys(kinds, adapters)
    assert adapters < 0.2 * everything
