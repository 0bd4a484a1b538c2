"""A run's folder with made-up but realistic figures, for tests of whatever reads runs."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any


def write_run(folder: Path, *, finished: bool = True) -> Path:
    """A finished quickstart, or one that was killed in the middle of PPO."""
    stages = [{"name": name} for name in ("sft", "reward", "ppo", "compare")]
    config = {"name": "quickstart", "seed": 17, "policy": {"kind": "causal_lm", "model": "package:some/model.gguf"}, "stages": stages}
    _write(folder / "run.json", {"alignkit": "0.1.0", "config": config})
    _stage(folder / "sft", "policy", 71.2, 62, _sft, parents={}, rows=1000)
    _stage(folder / "reward", "reward_model", 94.0, 22, _reward, parents={"sft": "a1"}, rows=350)
    if not finished:
        _metrics(folder / "ppo", 7, _ppo)
        with (folder / "ppo" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 8, "reward/sc')
        return folder
    _stage(folder / "ppo", "policy", 262.4, 25, _ppo, parents={"sft": "a1", "reward": "b2"}, rows=600)
    _write(folder / "compare" / "manifest.json", {"stage": "compare", "kind": "win_rate", "makes": "evaluation", "seconds": 41.0})
    _write(folder / "compare" / "evaluation.json", EVALUATION)
    return folder


EVALUATION: dict[str, Any] = {
    "candidate": "ppo", "baseline": "sft", "judge": "lexicon_sentiment", "prompts": 200, "samples_per_prompt": 1,
    "win_rate": 0.7775, "ci95_low": 0.72, "ci95_high": 0.83, "judge_mean_before": 0.157, "judge_mean_after": 0.544,
    "judge_gain": 0.387, "judge_gain_ci95_low": 0.321, "judge_gain_ci95_high": 0.452, "pairs": 199, "unscored_before": 1,
    "unscored_after": 0, "response_length_tokens_before": 15.2, "response_length_tokens_after": 16.9, "finished_share_before": 0.73,
    "finished_share_after": 0.94, "distinct_2_before": 0.94, "distinct_2_after": 0.80, "kl_sequence_nats": 12.41, "kl_token_nats": 0.734,
    "judge_accuracy": 0.708, "judge_accuracy_pairs": 117929,
    "examples": [
        {"prompt": "Deserves a place", "before": " on the list of Societies in Timerotation.",
         "after": " among friends in the world of creativity and self-expression.", "score_before": 0.0, "score_after": 0.6705},
        {"prompt": "The big finish", "before": " is <b>dull</b> & a bit of a mess.", "after": " is a delight, warm and wise.",
         "score_before": -0.7096, "score_after": 0.8442},
        {"prompt": "Much of the", "before": " film's charm lies in its cast.", "after": " time it's hard to care.",
         "score_before": 0.5859, "score_after": 0.4588},
        {"prompt": "Films are made", "before": "", "after": " by people who love them, and it shows.", "score_before": None,
         "score_after": 0.6369},
    ],
}  # fmt: skip


def _sft(step: int, noise: random.Random) -> dict[str, float]:
    found = {"loss/nll_nats": 4.2 + 1.3 * math.exp(-step / 9) + noise.gauss(0, 0.15), "optimizer/grad_norm": 2.0 + noise.gauss(0, 0.3),
             "optimizer/learning_rate": 3e-4 * (1 - step / 62), "time/step_seconds": 1.1 + noise.gauss(0, 0.05)}  # fmt: skip
    return found | ({"validation/loss_nll_nats": 4.21} if step == 62 else {})


def _reward(step: int, noise: random.Random) -> dict[str, float]:
    found = {"loss/ranking_nats": 0.69 - 0.02 * step + noise.gauss(0, 0.03), "reward/accuracy": 0.5 + 0.35 * (1 - math.exp(-step / 6)),
             "optimizer/grad_norm": float("nan")}  # fmt: skip
    return found | ({"validation/loss_ranking_nats": 0.36, "validation/reward_accuracy": 0.86} if step == 22 else {})


def _ppo(step: int, noise: random.Random) -> dict[str, float]:
    rise = 1 - math.exp(-step / 11)
    return {
        "reward/score_mean": -0.1 + 1.9 * rise + noise.gauss(0, 0.08), "reward/score_std": 1.0 - 0.2 * rise,
        "reward/total_mean": 1.2 * rise,
        "kl/sequence_nats": 12.5 * rise + noise.gauss(0, 0.2) * rise, "kl/token_k1_nats": 0.7 * rise, "kl/coef": 0.05,
        "response/length_tokens": 15 + 2 * rise + noise.gauss(0, 0.3), "response/finished_share": 0.73 + 0.2 * rise,
        "policy/entropy_nats": 3.9 - 1.1 * rise + noise.gauss(0, 0.05), "policy/clip_share": 0.1 + noise.gauss(0, 0.02),
        "policy/approx_kl_nats": 0.012 + noise.gauss(0, 0.002), "loss/policy": -0.02 + noise.gauss(0, 0.01),
        "loss/critic": 0.9 - 0.5 * rise,
        "critic/explained_variance": 0.1 + 0.5 * rise, "time/rollout_seconds": 4.8 + noise.gauss(0, 0.2), "time/update_seconds": 4.4,
        "time/reward_seconds": 0.8, "time/step_seconds": 10.1,
    }  # fmt: skip


def _stage(folder: Path, makes: str, seconds: float, steps: int, figures: Any, *, parents: dict[str, str], rows: int) -> None:
    _metrics(folder, steps, figures)
    data = {"training": {"kind": "jsonl", "sha256": "c0ffee", "found": rows, "kept": rows - 2, "dropped": 2, "truncated": 0}}
    manifest = {
        "stage": folder.name,
        "kind": folder.name,
        "makes": makes,
        "steps": steps,
        "parents": parents,
        "data": data,
        "seconds": seconds,
    }
    _write(folder / "manifest.json", manifest)


def _metrics(folder: Path, steps: int, figures: Any) -> None:
    noise = random.Random(folder.name)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step, **figures(step, noise)}) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def _write(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
