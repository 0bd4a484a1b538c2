"""Does PPO learn, every time, and as much for its KL as a peer's? Three tasks, a tiny pretrained model, five seeds, alignkit and TRL.

    python benchmarks/learning.py [--dir FOLDER] [--peer-python PYTHON] [--seeds 5]

From nothing: fetches film-review snippets, pretrains a small language model on them, trains a reward model for the third task, runs both
sides on the same model, prompts, rewards, budget and hyperparameters, and writes ``benchmarks/learning.json`` and a table. What is there
already is not done again. Without ``--peer-python`` it makes the peer's virtual environment in its folder.
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
from pathlib import Path
from typing import Any

from alignkit.quickstart.fetch import fetch_snippets, run_pip

HERE = Path(__file__).resolve().parent
TASKS = {"letters": "count of a letter", "sentiment": "lexicon sentiment", "trained": "trained reward model"}
NOISE = {"letters": 0.05, "sentiment": 0.1, "trained": 0.25}
"""A run that gains less has failed: about two standard errors of the difference of two means over three iterations of 64 scores."""
LOW_KL = 4.0
"""Nats per response: a distance at which little has gone wrong yet, beside the largest that all runs of a task reached."""
BUDGET: dict[str, Any] = {
    "iterations": 30, "episodes": 64, "epochs": 2, "max_new_tokens": 12, "learning_rate": 1e-3, "kl_coef": 0.05,
}  # fmt: skip
PROMPT_TOKENS = 4
Curve = list[tuple[float, float]]
"""KL (nats per response) and mean score of each iteration, both measured on the side's own rollouts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("learning"), help="where everything is put (learning)")
    parser.add_argument("--peer-python", type=Path, help="the python of an environment with trl 1.12 and vaderSentiment")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    folder = arguments.dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    peer = arguments.peer_python or peer_environment(folder / "peer")
    pretrain(folder)
    train_reward_model(folder)
    jobs = [(side, task, seed) for seed in range(arguments.seeds) for task in TASKS for side in ("alignkit", "trl")]
    with ThreadPoolExecutor(2) as pool:
        curves = dict(zip(jobs, pool.map(lambda job: run(folder, peer, *job), jobs), strict=True))
    results = [row for task in TASKS for row in rows(task, curves)]
    (HERE / "learning.json").write_text(json.dumps({"budget": BUDGET, "seeds": arguments.seeds, "results": results}, indent=1) + "\n")
    print(table(results))


def peer_environment(folder: Path) -> Path:
    python = folder / "bin" / "python"
    if not python.is_file():
        print("making the peer's environment", flush=True)
        venv.create(folder, with_pip=True)
        for packages in (["torch==2.13.0"], ["trl==1.12.0", "accelerate", "datasets", "peft", "vaderSentiment"]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def pretrain(folder: Path) -> None:
    """A Llama of less than a million parameters that continues film-review snippets and ends them; prompts are snippets' first tokens."""
    if (folder / "prompts.jsonl").is_file():
        return
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    snippets = fetch_snippets(run_pip, lambda text: print(text, flush=True))
    texts = [snippet.text for snippet in snippets]
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
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    starts = dict.fromkeys(tuple(row[:PROMPT_TOKENS]) for row in rows if len(row) > 2 * PROMPT_TOKENS)
    prompts = [tokenizer.decode(list(start)) for start in starts]
    kept = [
        text for start, text in zip(starts, prompts, strict=True) if tuple(tokenizer(text, add_special_tokens=False).input_ids) == start
    ]
    write_rankings(folder / "rankings.jsonl", snippets)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in kept[:2000]))


def write_rankings(path: Path, snippets: Sequence[Any]) -> None:
    """Snippets two by two, the one that people rated higher as the better one, where they were a point apart or more."""
    pairs = zip(snippets[::2], snippets[1::2], strict=False)
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
    alignkit(folder, "reward_model", 0, [stage])


def run(folder: Path, peer: Path, side: str, task: str, seed: int) -> Curve:
    """One side's run of a task, or what an earlier call left of it."""
    out = folder / f"{side}-{task}-{seed}.json"
    if not out.is_file():
        (ours if side == "alignkit" else theirs)(folder, peer, task, seed, out)
        print(f"{out.stem}: {json.loads(out.read_text())[-1]}", flush=True)
    curve: Curve = [tuple(point) for point in json.loads(out.read_text())]
    return curve


def ours(folder: Path, peer: Path, task: str, seed: int, out: Path) -> None:
    stage = {
        "name": "ppo",
        "optimizer": {
            "kind": "ppo", "iterations": BUDGET["iterations"], "prompts": BUDGET["episodes"], "max_new_tokens": BUDGET["max_new_tokens"],
            "epochs": BUDGET["epochs"], "minibatches": 1, "learning_rate": BUDGET["learning_rate"], "decay": "constant",
            "kl": {"coef": BUDGET["kl_coef"]},
            "critic": {"learning_rate": BUDGET["learning_rate"], "decay": "constant", "clip": 0.2},
        },
        "reward": {"kind": "python", "function": f"learning_rewards:{task}"},
        "prompts": {"kind": "jsonl", "path": str(folder / "prompts.jsonl")},
    }  # fmt: skip
    run_folder = alignkit(folder, f"{task}-{seed}", seed, [stage])
    lines = [json.loads(line) for line in (run_folder / "ppo" / "metrics.jsonl").read_text().splitlines()]
    out.write_text(json.dumps([(line["kl/sequence_nats"], line["reward/score_mean"]) for line in lines]))


def theirs(folder: Path, peer: Path, task: str, seed: int, out: Path) -> None:
    settings = {
        "model": str(folder / "model"),
        "prompts": str(folder / "prompts.jsonl"),
        "reward": task,
        "seed": seed,
        "out": str(out),
        **BUDGET,
    }
    subprocess.run(
        [peer, HERE / "learning_peer_trl.py", json.dumps(settings)], check=True, env=environment(folder), stdout=subprocess.DEVNULL
    )


def alignkit(folder: Path, name: str, seed: int, stages: list[dict[str, Any]]) -> Path:
    """Run a config; returns the run's folder."""
    run_folder, config = folder / "runs" / name, folder / f"{name}.yaml"
    policy = {"kind": "causal_lm", "model": str(folder / "model"), "precision": "float32"}
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


def rows(task: str, curves: dict[tuple[str, str, int], Curve]) -> list[dict[str, Any]]:
    """Each side's figures of a task: means over seeds, with the smallest and the largest."""
    smoothed = {(side, seed): smooth(curve) for (side, of, seed), curve in curves.items() if of == task}
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
        spread = {name: {"mean": statistics.mean(v), "low": min(v), "high": max(v)} for name, v in figures.items()}
        failed = sum(curve[-1][1] <= curve[0][1] + NOISE[task] for curve in mine)
        found.append({"task": task, "side": side, "seeds": len(mine), "failed": failed, "equal_kl_nats": level, **spread})
    return found


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    names = ("start", "final_reward", "final_kl_nats", "reward_at_low_kl", "reward_at_equal_kl")
    lines = [
        f"| task | side | failed seeds | start | final reward | final KL | reward at {LOW_KL:g} nats | reward at the common KL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        cells = [f"{row[name]['mean']:.3f} ({row[name]['low']:.3f} to {row[name]['high']:.3f})" for name in names]
        common = f"{TASKS[row['task']]} (common KL {row['equal_kl_nats']:.1f} nats)"
        lines.append(f"| {common} | {row['side']} | {row['failed']} of {row['seeds']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
