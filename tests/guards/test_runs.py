"""Each guard, triggered for real by a small run."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import alignkit
from alignkit.data.order import Order
from alignkit.errors import ConfigError, Interrupted, RunError, Stopped
from alignkit.files import sha256
from tests.runs import learnt, lines

POLICY = {"kind": "tiny_lm", "hidden_size": 16, "layers": 1, "heads": 2, "positions": 128}
SEED = 3


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows") -> dict[str, str]:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"kind": "jsonl", "path": str(path)}


def prompts(count: int, bad: Collection[int] = (), stop: Collection[int] = ()) -> list[dict[str, Any]]:
    return [{"id": f"p{i}", "prompt": f"{i} ", "bad": i in bad, "stop": i in stop} for i in range(count)]


def ppo(folder: Path, reward: str, data: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    """A stage of PPO with 8 prompts an iteration and a reward of ``rewards.py``."""
    critic = {"learning_rate": 1e-3, "decay": "constant"}
    defaults = {"kind": "ppo", "prompts": 8, "max_new_tokens": 16, "minibatches": 1, "learning_rate": 1e-3, "decay": "constant"}
    return {
        "name": "ppo",
        "optimizer": {**defaults, "critic": critic, **settings},
        "reward": {"kind": "python", "function": f"tests.guards.rewards:{reward}"},
        "prompts": write(folder, data),
    }


def config(folder: Path, *stages: dict[str, Any], **run: Any) -> Path:
    values = {"name": "run", "dir": str(folder / "run"), "seed": SEED, "policy": POLICY, "stages": list(stages), **run}
    (folder / "run.yaml").write_text(json.dumps(values))  # JSON is YAML
    return folder / "run.yaml"


def guarded(run: Path) -> list[dict[str, Any]]:
    return [event for event in lines(run / "events.jsonl") if event["event"] == "guard"]


def fed(count: int, step: int) -> list[int]:
    """The rows that a step of PPO is fed, if nothing is passed over."""
    order = Order(count, SEED, "ppo")
    return [order.take(8) for _ in range(step)][-1]


def failing_twice(folder: Path, stop: set[int]) -> Path:
    """Iterations 3, 4 and 5 of 9 cannot be learnt from, unless they are fed other rows."""
    bad = {fed(72, step)[0] for step in (3, 4, 5)}
    stage = ppo(folder, "explosive", prompts(72, bad, stop), iterations=9)
    return config(folder, stage, checkpoint={"minutes": 0, "keep": 1})


def test_three_skipped_steps_send_the_stage_back_and_a_killed_run_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = tmp_path / "flag"
    monkeypatch.setenv("ALIGNKIT_TEST_FLAG", str(flag))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    # The first pass over the 72 rows is nine iterations; what iteration 6 would have been fed is fed to iteration 3 after going back.
    stop = {fed(72, 7)[0]}
    run = alignkit.run(failing_twice(whole, stop))

    assert [(event["what"], event["step"]) for event in guarded(run)] == [
        ("skipped step", 3), ("skipped step", 4), ("skipped step", 5), ("rolled back", 5),
    ]  # fmt: skip
    steps = learnt(run, "ppo")
    assert [line["step"] for line in steps] == list(range(1, 10))
    assert [line["optimizer/learning_rate"] for line in steps] == pytest.approx([1e-3] * 2 + [5e-4] * 7)
    assert [line["critic/learning_rate"] for line in steps] == pytest.approx([1e-3] * 2 + [5e-4] * 7)
    # 3, 4 and 5 are done again with the rows of 6, 7 and 8, and so on: the bad ones come again in the next pass, one at a time.
    assert sum(line["guard/skipped_steps"] for line in steps[2:6]) == 0.0
    assert "Warnings" in (run / "report.html").read_text()

    flag.touch()
    file = failing_twice(killed, stop)
    with pytest.raises(Interrupted, match="is saved after step 4"):
        alignkit.run(file)
    assert not flag.exists()
    assert [event["what"] for event in guarded(killed / "run")][-1] == "rolled back"
    again = alignkit.run(file)
    assert learnt(again, "ppo") == steps
    assert sha256(again / "ppo" / "policy" / "model.safetensors") == sha256(run / "ppo" / "policy" / "model.safetensors")


def test_what_fails_for_ever_ends_the_run_and_says_what_to_look_at(tmp_path: Path) -> None:
    # One step at this rate makes weights whose products are infinite: no other rows, and no half of it, help.
    rows = [{"id": f"r{i}", "prompt": f"{i} ", "completion": "good"} for i in range(32)]
    stage = {
        "name": "sft",
        "optimizer": {"kind": "sft", "batch": 4, "learning_rate": 1e25, "decay": "constant"},
        "data": write(tmp_path, rows),
    }
    with pytest.raises(RunError, match=r"3 steps in a row was not finite, also after going back.*rows r\d") as ended:
        alignkit.run(config(tmp_path, stage, checkpoint={"minutes": 0}))
    assert "learning_rate" in str(ended.value)
    run = tmp_path / "run"
    assert [event["what"] for event in guarded(run)] == [*["skipped step"] * 3, "rolled back", *["skipped step"] * 3]
    assert not (run / "sft" / "policy").exists()
    for checkpoint in (run / "sft" / "checkpoints").glob("step-*"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(checkpoint / "optimizer.safetensors").values())


def test_a_reward_that_is_no_number_drops_its_sample(tmp_path: Path) -> None:
    bad = {fed(72, 2)[0]}
    stage = ppo(tmp_path, "sometimes_nothing", prompts(72, bad), iterations=3)
    run = alignkit.run(config(tmp_path, stage, guard={"dropped_share": 0.125}))
    assert [line["guard/dropped_samples"] for line in learnt(run, "ppo")] == [0.0, 1.0, 0.0]
    assert all(value is not None and math.isfinite(value) for line in learnt(run, "ppo") for value in line.values())
    (event,) = guarded(run)
    assert (event["what"], event["step"], event["samples"]) == ("dropped sample", 2, [f"p{min(bad)}/0"])
    assert "their rewards are not finite" in event["text"]


def test_too_many_dropped_samples_end_the_run(tmp_path: Path) -> None:
    stage = ppo(tmp_path, "sometimes_nothing", prompts(72, {fed(72, 2)[0]}), iterations=3)
    with pytest.raises(RunError, match=r"iteration 2: 1 of 8 responses have rewards that are not finite \(the first is p\d+/0\)"):
        alignkit.run(config(tmp_path, stage))  # a tenth is allowed, and it is an eighth


def test_a_policy_that_runs_away_is_stopped_saved_and_stays_so(tmp_path: Path) -> None:
    stage = ppo(tmp_path, "repetition", prompts(72), iterations=60, learning_rate=1e-2, epochs=2, kl={"coef": 0.0, "stop": 2.0})
    file = config(tmp_path, stage)
    with pytest.raises(Stopped, match=r"above kl\.stop \(2\) for 3 iterations") as stopped:
        alignkit.run(file)
    assert stopped.value.exit_code == 3
    run = tmp_path / "run"
    kls = [line["kl/sequence_nats"] for line in learnt(run, "ppo")]
    assert all(kl > 2.0 for kl in kls[-3:])
    assert kls[-4] <= 2.0
    assert guarded(run)[-1]["what"] == "kl"
    assert (run / "ppo" / "checkpoints" / f"step-{len(kls):08d}").is_dir()
    kept = run / "ppo" / "candidates" / "within-kl-stop"
    assert kept.is_dir() == any(1.0 < kl <= 2.0 for kl in kls)
    assert (str(kept) in str(stopped.value)) == kept.is_dir()
    assert not (run / "ppo" / "policy").exists()

    with pytest.raises(Stopped, match="ppo was stopped"):
        alignkit.run(file)
    assert len(learnt(run, "ppo")) == len(kls)


def short_sft(folder: Path) -> dict[str, Any]:
    """A policy that says two letters and stops."""
    rows = [{"prompt": f"{i} ", "completion": "ab"} for i in range(64)]
    optimizer = {"kind": "sft", "batch": 16, "epochs": 12, "learning_rate": 1e-2}
    return {"name": "sft", "optimizer": optimizer, "data": write(folder, rows, "demonstrations")}


def test_a_reward_that_is_the_length_is_noticed(tmp_path: Path) -> None:
    stage = ppo(tmp_path, "length", prompts(72), iterations=30, samples_per_prompt=4, learning_rate=5e-3, kl={"coef": 0.0, "stop": None})
    run = alignkit.run(config(tmp_path, short_sft(tmp_path), {**stage, "start": "sft"}))
    found = {event["what"]: event for event in guarded(run)}
    assert found["length"]["step"] < 25
    line = learnt(run, "ppo")[found["length"]["step"] - 1]
    assert line["guard/length_correlation"] > 0.6
    assert line["guard/length_ratio"] > 1.5
    assert found["length"]["figure"] == line["guard/length_correlation"]
    assert sum(event["what"] == "length" for event in guarded(run)) == 1
    page = (run / "report.html").read_text()
    assert "the reward may be measuring length" in page
    assert 'class="mark warned"' in page


def test_a_reward_for_repetition_is_noticed(tmp_path: Path) -> None:
    stage = ppo(tmp_path, "repetition", prompts(72), iterations=40, samples_per_prompt=4, learning_rate=1e-2, epochs=2)
    stage["optimizer"]["kl"] = {"coef": 0.0, "stop": None}
    run = alignkit.run(config(tmp_path, stage))
    found = {event["what"]: event["step"] for event in guarded(run)}
    assert found["repetition"] <= 40
    assert learnt(run, "ppo")[0]["guard/repetitive_share"] == 0.0


def test_a_constant_reward_is_noticed_at_once(tmp_path: Path) -> None:
    run = alignkit.run(config(tmp_path, ppo(tmp_path, "constant", prompts(16), iterations=6)))
    assert [(event["what"], event["step"]) for event in guarded(run)] == [("flat reward", 4)]  # 32 responses, 8 an iteration


def test_a_judge_that_thinks_less_and_less_of_a_rising_reward_ends_the_stage(tmp_path: Path) -> None:
    stage = ppo(tmp_path, "length", prompts(72), iterations=40, samples_per_prompt=4, learning_rate=5e-3, kl={"coef": 0.0, "stop": None})
    judge = {"kind": "python", "function": "tests.guards.rewards:brevity"}
    stage |= {"start": "sft", "watch": {"reward": judge, "prompts": write(tmp_path, prompts(24), "held_out"), "every": 3, "stop": True}}
    with pytest.raises(Stopped, match=r"the reward rose from \S+ to \S+ while the judge fell from"):
        alignkit.run(config(tmp_path, short_sft(tmp_path), stage))
    looks = [line for line in learnt(tmp_path / "run", "ppo") if "guard/judge_mean" in line]
    assert [line["step"] for line in looks] == list(range(3, looks[-1]["step"] + 1, 3))
    judged = [line["guard/judge_mean"] for line in looks[-4:]]
    assert judged == sorted(judged, reverse=True)


def test_only_rollouts_can_be_watched(tmp_path: Path) -> None:
    watch = {"reward": {"kind": "python", "function": "tests.guards.rewards:brevity"}, "prompts": write(tmp_path, prompts(2))}
    with pytest.raises(ConfigError, match=r"sft\.watch is not used: optimizer sft learns from demonstrations"):
        alignkit.run(config(tmp_path, {**short_sft(tmp_path), "watch": watch}))
