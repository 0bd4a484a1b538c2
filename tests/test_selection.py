"""The best of a stage's validated weights becomes its artifact: by loss, or by the reward of what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import alignkit
from alignkit.errors import ConfigError, RunError
from alignkit.files import sha256
from alignkit.selection import Selection, by_loss
from alignkit.types import Metrics

DATA = Path(__file__).parent.parent / "configs" / "smoke"


def writing(text: str) -> Any:
    return lambda folder: (folder / "weights.txt").write_text(text)


def scores(candidate: Path, validation: Metrics) -> Metrics:
    """The number that was written as the weights."""
    return {"selection/score": float((candidate / "weights.txt").read_text())}


def test_the_best_candidate_is_kept_and_the_others_are_not(tmp_path: Path) -> None:
    selection = Selection(tmp_path / "candidates", scores)
    for step, weights in ((10, "1.5"), (20, "3"), (30, "2")):
        selection.consider(step, {"loss/nll_nats": 0.1 * step}, writing(weights))
        assert len(list((tmp_path / "candidates").iterdir())) == 1
    hashes = selection.take(tmp_path / "policy")
    assert (tmp_path / "policy" / "weights.txt").read_text() == "3"
    assert hashes["weights.txt"].sha256 == sha256(tmp_path / "policy" / "weights.txt")
    assert selection.report() == {
        "chosen_step": 20,
        "candidates": [
            {"step": 10, "score": 1.5, "loss/nll_nats": 1.0},
            {"step": 20, "score": 3.0, "loss/nll_nats": 2.0},
            {"step": 30, "score": 2.0, "loss/nll_nats": 3.0},
        ],
    }


def test_a_candidate_whose_score_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    selection = Selection(tmp_path / "candidates", scores)
    for step, weights in ((1, "nan"), (2, "-5"), (3, "nan"), (4, "inf")):
        selection.consider(step, {"loss/nll_nats": float(weights)}, writing(weights))
    assert [path.name for path in (tmp_path / "candidates").iterdir()] == ["step-00000002"]
    assert selection.report()["chosen_step"] == 2
    assert [one["score"] for one in selection.report()["candidates"]] == [None, -5.0, None, None]
    json.dumps(selection.report() | dict(selection.state().values), allow_nan=False)


def test_where_no_score_is_a_number_there_is_nothing_to_take(tmp_path: Path) -> None:
    selection = Selection(tmp_path / "candidates", scores)
    selection.consider(1, {}, writing("nan"))
    assert selection.best is None
    assert list((tmp_path / "candidates").iterdir()) == []
    with pytest.raises(RunError, match="none of the 1 candidates of this stage has a score that is a number"):
        selection.take(tmp_path / "policy")


def test_a_stage_that_was_sent_back_takes_the_best_that_is_still_there(tmp_path: Path) -> None:
    first = Selection(tmp_path / "candidates", scores)
    first.consider(1, {}, writing("5"))
    saved = first.state()
    first.consider(2, {}, writing("6"))  # and 1 is removed
    again = Selection(tmp_path / "candidates", scores)
    again.load_state(saved)
    again.consider(2, {}, writing("4"))  # with other rows it is another candidate
    again.consider(3, {}, writing("3"))
    again.take(tmp_path / "policy")
    assert (tmp_path / "policy" / "weights.txt").read_text() == "4"


def test_of_equals_the_earliest_is_kept(tmp_path: Path) -> None:
    selection = Selection(tmp_path / "candidates", scores)
    for step in (1, 2):
        selection.consider(step, {}, writing("7"))
    assert selection.report()["chosen_step"] == 1


def test_a_restored_selection_knows_what_came_before(tmp_path: Path) -> None:
    first = Selection(tmp_path / "candidates", scores)
    first.consider(1, {}, writing("5"))
    second = Selection(tmp_path / "candidates", scores)
    second.load_state(first.state())
    second.consider(2, {}, writing("4"))
    second.take(tmp_path / "policy")
    assert (tmp_path / "policy" / "weights.txt").read_text() == "5"


def test_a_best_candidate_that_is_gone_is_an_error_and_not_another_candidate(tmp_path: Path) -> None:
    first = Selection(tmp_path / "candidates", scores)
    first.consider(1, {}, writing("5"))
    (tmp_path / "candidates" / "step-00000001" / "weights.txt").unlink()
    (tmp_path / "candidates" / "step-00000001").rmdir()
    with pytest.raises(RunError, match="step-00000001 is the best candidate of this stage, and it is gone"):
        first.take(tmp_path / "policy")


def test_by_loss_the_lowest_is_best(tmp_path: Path) -> None:
    assert by_loss(tmp_path, {"loss/nll_nats": 0.5, "reward/accuracy": 0.9}) == {"selection/score": -0.5}
    with pytest.raises(RunError, match=r"the validation figures are reward/accuracy, and none of them is a loss"):
        by_loss(tmp_path, {"reward/accuracy": 0.9})


def config(folder: Path, **select: Any) -> Path:
    """SFT, a reward model, and SFT once more with a choice among its weights: the order of InstructGPT."""
    jsonl = {name: {"kind": "jsonl", "path": str(DATA / f"{name}.jsonl")} for name in ("demonstrations", "rankings", "prompts.heldout")}
    sft = {
        "optimizer": {"kind": "sft", "epochs": 2, "batch": 8, "learning_rate": 3e-3},
        "data": jsonl["demonstrations"],
        "validation": {"kind": "jsonl", "path": str(DATA / "demonstrations.validation.jsonl")},
    }
    reward = {"name": "reward", "start": "sft", "optimizer": {"kind": "reward_model", "batch": 8}, "data": jsonl["rankings"]}
    if select.get("by") == "reward":
        select |= {"reward": {"kind": "reward_model", "stage": "reward"}, "prompts": jsonl["prompts.heldout"], "max_new_tokens": 8}
    chosen = {"name": "chosen", **sft, "validate_every": 3, "select": select}
    stages = [{"name": "sft", **sft}, reward, chosen]
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({"name": "run", "dir": str(folder / "run"), "policy": {"kind": "tiny_lm"}, "stages": stages}))
    return file


@pytest.mark.parametrize("by", ["loss", "reward"])
def test_a_stage_keeps_its_best_weights_and_the_manifest_tells_all_figures(tmp_path: Path, by: str) -> None:
    run = alignkit.run(config(tmp_path, by=by))
    manifest = json.loads((run / "chosen" / "manifest.json").read_text())
    found = manifest["selection"]
    steps = [candidate["step"] for candidate in found["candidates"]]
    assert steps[:2] == [3, 6]
    assert steps[-1] == manifest["steps"]
    best = max(found["candidates"], key=lambda one: one["score"])
    assert found["chosen_step"] == best["step"]
    assert all(candidate["loss/nll_nats"] > 0 for candidate in found["candidates"])
    if by == "loss":
        assert all(candidate["score"] == -candidate["loss/nll_nats"] for candidate in found["candidates"])
    assert ("reward" in manifest["parents"]) == (by == "reward")
    assert all(sha256(run / "chosen" / "policy" / name) == facts["sha256"] for name, facts in manifest["files"].items())
    assert not (run / "chosen" / "candidates").exists()
    logged = [json.loads(line) for line in (run / "chosen" / "metrics.jsonl").read_text().splitlines()]
    assert [line["selection/score"] for line in logged if "selection/score" in line] == [one["score"] for one in found["candidates"]]


@pytest.mark.parametrize(
    ("select", "drop", "message"),
    [
        ({"by": "loss"}, "validate_every", "chosen.select has one candidate to choose from: chosen.validate_every is 0"),
        ({"by": "loss"}, "validation", "chosen.select is by loss, and chosen has no validation data"),
        ({"by": "loss", "reward": {"kind": "python", "function": "a:b"}}, None, "reward is not used to select by loss; remove it"),
        ({"by": "luck"}, None, 'is "luck"; allowed: loss, reward'),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(tmp_path: Path, select: dict[str, Any], drop: str | None, message: str) -> None:
    file = config(tmp_path, **select)
    values = yaml.safe_load(file.read_text())
    if drop:
        del values["stages"][2][drop]
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError) as refused:
        alignkit.run(file)
    assert message in str(refused.value)


def test_to_select_by_reward_it_must_be_said_what_scores(tmp_path: Path) -> None:
    file = config(tmp_path, by="reward")
    values = yaml.safe_load(file.read_text())
    del values["stages"][2]["select"]["reward"]
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match="reward is missing; to select by reward, responses to prompts are drawn and scored"):
        alignkit.run(file)
