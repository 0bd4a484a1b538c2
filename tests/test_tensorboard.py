"""The TensorBoard tracker, read back the way TensorBoard reads."""

from __future__ import annotations

import json
import math
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import alignkit
from alignkit.api import RunError, Tracker
from alignkit.testing import Conformance
from alignkit_tensorboard import TensorBoardConfig, register_trackers

CONFIGS = Path(__file__).parents[1] / "configs"


class TestTensorBoard(Conformance):
    interface = Tracker
    spec = register_trackers()[0]
    config = TensorBoardConfig(folder="boards")
    wrong = ({"folder": 3}, {"folder": " "})


def tracker(run: Path) -> Tracker:
    return register_trackers()[0].build(TensorBoardConfig(), run)


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All scalars: (step, value) by name."""
    events: Any = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_each_stage_has_its_figures_under_their_own_names(tmp_path: Path) -> None:
    board = tracker(tmp_path)
    board.log("sft", 1, {"loss/nll_nats": 2.5})
    board.log("ppo", 1, {"reward/score_mean": 0.25, "kl/sequence_nats": 0.0})
    board.log("ppo", 2, {"reward/score_mean": 0.75, "kl/sequence_nats": math.nan})
    board.close()
    assert read(tmp_path / "tensorboard" / "sft") == {"sft/loss/nll_nats": [(1, 2.5)]}
    ppo = read(tmp_path / "tensorboard" / "ppo")
    assert ppo["ppo/reward/score_mean"] == [(1, 0.25), (2, 0.75)]
    assert ppo["ppo/kl/sequence_nats"][0] == (1, 0.0)
    assert math.isnan(ppo["ppo/kl/sequence_nats"][1][1])


def test_steps_that_are_done_again_replace_those_of_the_killed_run(tmp_path: Path) -> None:
    killed = tracker(tmp_path)
    for step in (1, 2, 3, 4):
        killed.log("ppo", step, {"kl/sequence_nats": float(step)})
    # It was never closed; the run goes on from the checkpoint of step 2.
    resumed = tracker(tmp_path)
    for step in (3, 4, 5):
        resumed.log("ppo", step, {"kl/sequence_nats": 10.0 * step})
    resumed.close()
    assert read(tmp_path / "tensorboard" / "ppo") == {"ppo/kl/sequence_nats": [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]}
    killed.close()


def test_steps_to_which_a_stage_was_sent_back_replace_what_came_of_them_first(tmp_path: Path) -> None:
    board = tracker(tmp_path)
    for step, value in ((1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (3, 30.0), (4, 40.0), (5, 50.0)):
        board.log("sft", step, {"loss/nll_nats": value})
    board.log("ppo", 1, {"loss/nll_nats": 7.0})
    board.close()
    assert read(tmp_path / "tensorboard" / "sft") == {"sft/loss/nll_nats": [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]}
    assert read(tmp_path / "tensorboard" / "ppo") == {"ppo/loss/nll_nats": [(1, 7.0)]}


def test_the_same_folder_name_elsewhere_is_taken_as_it_stands(tmp_path: Path) -> None:
    board = register_trackers()[0].build(TensorBoardConfig(folder=str(tmp_path / "boards")), tmp_path / "run")
    board.log("sft", 1, {"loss/nll_nats": 2.0})
    board.close()
    assert read(tmp_path / "boards" / "sft") == {"sft/loss/nll_nats": [(1, 2.0)]}


def test_a_run_logs_every_step_once_even_where_a_stage_was_done_again(tmp_path: Path) -> None:
    config = yaml.safe_load((CONFIGS / "smoke.yaml").read_text(encoding="utf-8").replace("smoke/", f"{CONFIGS / 'smoke'}/"))
    config |= {"dir": str(tmp_path / "run"), "stages": config["stages"][:1], "trackers": [{"kind": "tensorboard", "folder": "boards"}]}
    config["stages"][0]["optimizer"]["epochs"] = 1
    (tmp_path / "smoke.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    run = alignkit.run(tmp_path / "smoke.yaml")
    (run / "sft" / "manifest.json").unlink()  # as if it had been killed before its first checkpoint
    alignkit.run(tmp_path / "smoke.yaml")
    logged = [json.loads(line) for line in (run / "sft" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    shown = read(run / "boards" / "sft")
    assert len(logged) > 1
    steps, losses = zip(*shown["sft/loss/nll_nats"], strict=True)
    assert list(steps) == [line["step"] for line in logged]
    assert list(losses) == pytest.approx([line["loss/nll_nats"] for line in logged])
    assert [step for step, _ in shown["sft/validation/loss_nll_nats"]] == [len(logged)]


def test_a_folder_that_cannot_be_written_to_is_an_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where a folder should be")
    with pytest.raises(RunError, match=r"tensorboard cannot be written: Not a directory; .*or leave the tracker out"):
        tracker(tmp_path).log("sft", 1, {"loss/nll_nats": 2.0})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full")
def test_a_full_disk_is_one_error_without_the_traceback_of_a_thread(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = threading.excepthook
    board = tracker(tmp_path)
    board.log("sft", 1, {"loss/nll_nats": 2.0})
    [events] = (tmp_path / "tensorboard" / "sft").iterdir()
    events.unlink()
    events.symlink_to("/dev/full")
    with pytest.raises(RunError, match="tensorboard cannot be written: No space left on device; repair this"):
        board.log("sft", 2, {"loss/nll_nats": 1.0})
    with pytest.raises(RunError, match="tensorboard cannot be written"):
        board.close()
    assert capfd.readouterr().err == ""
    assert threading.excepthook == before


def test_a_missing_package_is_an_error_with_the_line_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(RunError, match=r'needs the package tensorboard, .*; run: pip install "alignkit\[tensorboard\]"'):
        tracker(tmp_path)
