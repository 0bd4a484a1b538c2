"""When a stage is sent back, when it is ended, and what a checkpoint knows of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.checkpoint import forget, save_checkpoint
from alignkit.config.schema import CheckpointConfig, GuardConfig
from alignkit.errors import PoisonedError, RunError, Stopped
from alignkit.guards.finite import finite_rows, not_finite
from alignkit.guards.guard import Guard, RollBack
from alignkit.interfaces import State
from alignkit.saving import Saves
from alignkit.tracking import EventLog, MetricsFile


def make(folder: Path, settings: str = "lr 1", said: list[str] | None = None, **config: Any) -> Guard:
    return Guard("sft", GuardConfig(**config), settings, (said if said is not None else []).append, EventLog(folder / "events.jsonl"))


def steps(guard: Guard, first: int, skipped: str) -> None:
    """One step a letter, an x for one that was skipped."""
    for step, letter in enumerate(skipped, start=first):
        guard.begin(step)
        guard.settle(float(letter == "x"), [f"row-{step}"])


def events(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_two_in_a_row_are_forgiven_and_the_third_sends_the_stage_back_to_before_the_first(tmp_path: Path) -> None:
    said: list[str] = []
    guard = make(tmp_path, said=said)
    steps(guard, 1, "..xx.x.")
    with pytest.raises(RollBack) as back:
        steps(guard, 8, "xxx")
    assert (back.value.first, back.value.last) == (8, 10)
    assert said[0] == "sft: step 3 taught nothing: a loss or gradient of it was not finite (rows row-3)"
    assert [event["step"] for event in events(tmp_path) if event["what"] == "skipped step"] == [3, 4, 6, 8, 9, 10]
    assert events(tmp_path)[-1]["what"] == "rolled back"


def test_six_of_the_last_hundred_are_too_many(tmp_path: Path) -> None:
    guard = make(tmp_path)
    steps(guard, 1, ("x" + 9 * ".") * 5)
    with pytest.raises(RollBack) as back:
        steps(guard, 51, "x")
    assert (back.value.first, back.value.last) == (1, 51)
    # Five, for ever, are not: each leaves the window before the next comes in.
    patient = make(tmp_path)
    steps(patient, 1, ("x" + 19 * ".") * 20)


def test_limits_are_what_the_config_says(tmp_path: Path) -> None:
    with pytest.raises(RollBack):
        steps(make(tmp_path, skips=1), 1, "x")
    with pytest.raises(RollBack):
        steps(make(tmp_path, skipped_share=0.0), 1, "x")


def test_a_second_time_the_run_ends_and_says_what_to_look_at(tmp_path: Path) -> None:
    guard = make(tmp_path)
    with pytest.raises(RollBack):
        steps(guard, 1, "xxx")
    guard.returned()
    assert guard.rate == 0.5
    with pytest.raises(RunError, match=r"step 3: .* 3 steps in a row .* also after going back.* \(rows row-3\), at learning_rate") as ended:
        steps(guard, 1, "xxx")
    assert "scale of the rewards" in str(ended.value)
    assert "precision" in str(ended.value)


def test_all_of_it_is_in_the_state(tmp_path: Path) -> None:
    whole, first, second = make(tmp_path), make(tmp_path), make(tmp_path)
    for guard in (whole, first):
        steps(guard, 1, ".xx")
    second.load_state(State(values=json.loads(json.dumps(dict(first.state().values)))))
    for guard in (whole, second):
        with pytest.raises(RollBack) as back:
            steps(guard, 4, "x")
        assert back.value.first == 2
        guard.returned()
    again = make(tmp_path)
    again.load_state(second.state())
    assert again.state() == whole.state()
    assert again.rate == 0.5
    with pytest.raises(RunError):
        steps(again, 5, "xxx")


def test_a_stage_that_was_stopped_stays_so_until_its_settings_are_changed(tmp_path: Path) -> None:
    guard = make(tmp_path)
    guard.stop("too far")
    assert guard.stopped == "too far"
    with pytest.raises(Stopped, match="sft was stopped: too far"):
        make(tmp_path).load_state(guard.state())
    changed = make(tmp_path, settings="lr 2")
    changed.load_state(guard.state())
    assert changed.stopped is None


def test_the_checkpoint_to_go_back_to_is_not_pruned_and_later_ones_are_forgotten(tmp_path: Path) -> None:
    guard = make(tmp_path / "..")
    states = {"optimizer": State({"weight/w": torch.ones(2)})}
    for step, letter in enumerate("..x..xx", start=1):
        steps(guard, step, letter)
        save_checkpoint(tmp_path, step, states, 1, anchors=guard.anchors())
    # 2 is before the first skip of the last hundred steps, 5 before the first of this row, 7 is the newest.
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000002", "step-00000005", "step-00000007"]
    forget(tmp_path, 6)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000002", "step-00000005"]
    forget(tmp_path / "nothing", 1)


def test_what_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    said: list[str] = []

    class Part:
        weight = torch.ones(3)

        def state(self) -> State:
            return State({"weight/w": self.weight})

        def load_state(self, state: State) -> None:
            self.weight = state.tensors["weight/w"]

    part = Part()
    events = EventLog(tmp_path / "events.jsonl")
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    saves = Saves(tmp_path / "checkpoints", {"optimizer": part}, metrics, CheckpointConfig(), said.append, events, make(tmp_path))
    metrics.log("sft", 1, {})
    saves.attempt(1)
    part.weight = torch.tensor([1.0, float("inf"), 1.0])
    saves.attempt(2)
    assert said == ["not saved after step 2: optimizer/weight/w is not finite; what was saved before is intact, and is gone on from"]
    with pytest.raises(PoisonedError, match="optimizer/weight/w is not finite"):
        saves.final(2)
    assert saves.resume() == 1
    assert torch.equal(part.weight, torch.ones(3))


def test_rows_are_judged_by_what_counts() -> None:
    nan, inf = float("nan"), float("inf")
    figures = torch.tensor([[nan, 1.0], [1.0, inf], [1.0, 2.0]])
    mask = torch.tensor([[False, True], [True, True], [True, True]])
    assert finite_rows(figures, mask).tolist() == [True, False, True]
    assert not_finite({"a": State({"x": torch.ones(2)}), "b": State({"y": figures})}) == "b/y"
    assert not_finite({"a": State({"x": torch.ones(2, dtype=torch.uint8), "y": torch.zeros(0), "z": torch.tensor(3.0)})}) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 17, 999])
def test_one_number_among_many_is_found(dtype: torch.dtype, value: float, place: int) -> None:
    tensor = torch.linspace(-9.0, 9.0, 1000).to(dtype).reshape(40, 25)
    assert not_finite({"a": State({"x": tensor})}) is None
    tensor.view(-1)[place] = value
    assert not_finite({"a": State({"x": tensor})}) == "a/x"
