"""Runs with a reward service that answers otherwise each time it is asked: killed, left alone, continued, and the same in the end."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

import alignkit
from tests.plugins.reward_service import RewardService, reward_service
from tests.runs import learnt, weights
from tests.serve.running import until

pytestmark = pytest.mark.slow

REQUESTS = 4  # a step: 16 samples by 4


def write_config(folder: Path, service: RewardService) -> Path:
    """PPO on a tiny model; each prompt is asked once in the whole run, so that its id is its step's."""
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"id": f"p{i}", "prompt": f"Say {i}."}) + "\n" for i in range(64)))
    waits = {"timeout_seconds": 1.0, "deadline_seconds": 1.0, "cooldown_seconds": 0.1}
    reward = {"kind": "http", "url": service.url, "batch": 4, "concurrency": 1, **waits}
    ppo = {"kind": "ppo", "iterations": 4, "prompts": 16, "max_new_tokens": 8, "minibatches": 2, "learning_rate": 1e-3}
    prompts = {"kind": "jsonl", "path": str(folder / "prompts.jsonl")}
    stage = {"name": "ppo", "optimizer": ppo, "reward": reward, "prompts": prompts}
    config = folder / "run.yaml"
    run = {"name": "run", "seed": 7, "kernels": "plain", "policy": {"kind": "tiny_lm"}, "stages": [stage]}
    config.write_text(json.dumps(run))  # JSON is YAML
    return config


def begin(config: Path, run: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "alignkit", "run", str(config), f"dir={run}", *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(config: Path, run: Path, *overrides: str) -> None:
    process = begin(config, run, *overrides)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def journal(run: Path) -> dict[str, float]:
    """Of a copy, whatever state a killed process left it in: what each sample was answered."""
    copied = Path(shutil.copytree(run / "ppo", run.parent / "copied", dirs_exist_ok=True))
    with closing(sqlite3.connect(copied / "rewards.db")) as connection:
        found = connection.execute("SELECT sample_id, json_extract(score, '$.value') FROM answer").fetchall()
    assert len(dict(found)) == len(found)
    return dict(found)


def assert_as_if_never_stopped(run: Path, folder: Path) -> None:
    """An uninterrupted run, with a service that gives the answers of the journal, learns the same."""
    answers = journal(run)
    assert len(answers) == 64
    folder.mkdir()
    with reward_service(folder / "service", scores=answers) as service:
        again = alignkit.run(write_config(folder, service), [f"dir={folder / 'run'}"])
    assert weights(again) == weights(run)
    assert learnt(again, "ppo") == learnt(run, "ppo")
    assert len({step["reward/score_mean"] for step in learnt(run, "ppo")}) == 4


@pytest.mark.parametrize("minutes", [10.0, 0.0], ids=["without a checkpoint", "with one after each step"])
def test_a_run_killed_in_the_middle_of_a_step_asks_nothing_twice_and_arrives_at_the_same_weights(tmp_path: Path, minutes: float) -> None:
    run, stuck = tmp_path / "run", 2 * REQUESTS + 2  # the third request of the third step is not answered
    with reward_service(tmp_path / "service", scores="random", replies=[{}] * stuck + [{"sleep": 60.0}]) as service:
        config = write_config(tmp_path, service)
        long = ("ppo.reward.timeout_seconds=100", "ppo.reward.deadline_seconds=100", f"checkpoint.minutes={minutes}")
        process = begin(config, run, *long)
        until(lambda: len(service.noted("asked")) > stuck or process.poll() is not None, seconds=120.0)
        process.kill()
        process.communicate()
        before, asked = journal(run), len(service.noted("asked"))
        assert 2 * 16 + 4 <= len(before) <= 2 * 16 + 8
        assert (run / "ppo" / "checkpoints").exists() == (minutes == 0.0)
        finish(config, run, *long)
        again = [sample for ids in service.noted("asked")[asked:] for sample in ids]
    assert set(again) & set(before) == set()
    assert len(again) == 64 - len(before)
    assert before.items() <= journal(run).items()
    assert_as_if_never_stopped(run, tmp_path / "again")


def test_a_run_whose_service_is_away_saves_its_last_step_and_goes_on_when_it_is_back(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with reward_service(tmp_path / "service", scores="random", replies=[{}] * (2 * REQUESTS + 1) + [{"status": 503}] * 100) as service:
        config = write_config(tmp_path, service)
        for _ in range(2):  # the second time it is still away
            process = begin(config, run)
            said, errors = process.communicate(timeout=300)
            assert process.returncode == 75, errors
            assert errors.count("\n") == 1
            assert f"the reward service {service.url} left " in errors
            assert "503 Service Unavailable. Look at the service; the same command continues the run" in errors
            assert [path.name for path in (run / "ppo" / "checkpoints").iterdir()] == ["step-00000002"]
            assert len(learnt(run, "ppo")) == 2
        assert "continuing after step 2" in said
        before, asked = journal(run), len(service.noted("asked"))
        assert len(before) == 2 * 16 + 4
        service.kill()
        service.plan = {"scores": "random"}
        service.start()
        finish(config, run)
        again = [sample for ids in service.noted("asked")[asked:] for sample in ids]
    assert len(again) == 64 - len(before)
    assert set(again) & set(before) == set()
    assert_as_if_never_stopped(run, tmp_path / "again")


def test_what_a_judge_said_in_an_evaluation_is_kept_too(tmp_path: Path) -> None:
    prompts = {"kind": "jsonl", "path": str(tmp_path / "prompts.jsonl")}
    with reward_service(tmp_path / "service", scores="random", replies=[{}, {"status": 400}]) as service:
        config = write_config(tmp_path, service)
        judge = {"kind": "http", "url": service.url, "batch": 64}
        value = json.loads(config.read_text())
        value["stages"][0] |= {"reward": {"kind": "python", "function": "tests.plugins.test_http_reward_run:ones"}}
        value["stages"][0]["optimizer"]["iterations"] = 1
        evaluate = {"kind": "win_rate", "candidate": "ppo", "baseline": "ppo", "judge": judge, "prompts": prompts, "max_new_tokens": 4}
        config.write_text(json.dumps({**value, "stages": [*value["stages"], {"name": "compare", "evaluate": evaluate}]}))
        with pytest.raises(alignkit.errors.RunError, match="answered 400"):
            alignkit.run(config, [f"dir={tmp_path / 'run'}"])
        run = alignkit.run(config, [f"dir={tmp_path / 'run'}"])
        assert len(service.noted("asked")) == 3  # both sides, one of them once more
    assert not (run / "ppo" / "rewards.db").exists()
    with closing(sqlite3.connect(run / "compare" / "rewards.db")) as connection:
        counts = connection.execute("SELECT step, occurrence, count(*) FROM answer GROUP BY 1, 2").fetchall()
    assert counts == [(0, 0, 64), (0, 1, 64)]  # the same answers twice: they are told apart


def ones(samples: list[object]) -> list[float]:
    return [1.0 for _ in samples]
