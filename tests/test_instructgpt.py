"""The whole of InstructGPT as one config, and what its parts leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import alignkit
from alignkit.data.records import demonstrations
from alignkit.data.sources import FileConfig
from alignkit.models.config import TuningConfig
from alignkit.models.scalar import load_scalar
from alignkit.registry import find_plugins
from alignkit.types import Sample
from alignkit_reward_model.source import TrainedReward

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "instructgpt"
    return alignkit.run(CONFIGS / "instructgpt.yaml", [f"dir={folder}"])


def manifest(run: Path, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / stage / "manifest.json").read_text())
    return found


def test_the_supervised_baseline_is_the_checkpoint_that_the_reward_model_likes_best(run: Path) -> None:
    selection = manifest(run, "sft_selected")["selection"]
    assert len(selection["candidates"]) > 2
    best = max(selection["candidates"], key=lambda one: one["score"])
    assert selection["chosen_step"] == best["step"]
    assert set(manifest(run, "sft_selected")["parents"]) == {"reward"}


def test_the_reward_model_gives_demonstrations_zero_on_average(run: Path) -> None:
    model = load_scalar(run / "reward" / "reward_model", tuning=TuningConfig(), precision="float32", trainable=False, seed=0)
    rows = list(find_plugins().data("jsonl").build(FileConfig(path=str(CONFIGS / "smoke" / "demonstrations.jsonl"))).rows())
    samples = [Sample(one.prompt, one.completion[0].content) for one in demonstrations(rows)]
    scores = [score.value or 0.0 for score in TrainedReward(model, checks=True).score(samples)]
    assert sum(scores) / len(scores) == pytest.approx(0.0, abs=1e-4)
    assert model.offset != 0.0
    assert model.gain == 1.0


def test_pretraining_text_was_learnt_in_sft_and_in_ppo(run: Path) -> None:
    lines = {stage: [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()] for stage in ("sft", "ppo")}
    rows = sum(line["data/pretraining_rows"] for line in lines["sft"])
    assert rows / (rows + 8 * len(lines["sft"])) == pytest.approx(0.1, abs=0.02)
    assert all(line["loss/pretraining_nats"] > 0 for line in lines["ppo"])


def test_the_tax_is_measured_against_the_policy_that_ppo_started_from(run: Path) -> None:
    figures = json.loads((run / "tax" / "evaluation.json").read_text())
    assert [entry["policy"] for entry in figures["text_loss"]] == ["sft", "ppo"]
    assert figures["text_loss"][0]["difference_nats"] == 0.0
    assert figures["text_loss"][1]["difference_nats"] != 0.0
