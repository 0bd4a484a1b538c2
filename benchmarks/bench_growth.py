"""What alignkit's time and memory grow with: points without a bar, and the figure of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.report.svg import STYLE, Series, line_chart
from benchmarks.bench_rows import hf, ours
from benchmarks.bench_setup import random_model, real_model
from benchmarks.bench_table import Result, figures
from benchmarks.bench_work import Work

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.bench import Bench
    from benchmarks.bench_pipe import Worker
    from benchmarks.bench_rows import Side

TURNS = 3
BATCHES = (1, 4, 16, 64)
SIZES = {"tiny": (4, 128, 2048), "5m": (6, 256, 4096), "30m": (12, 448, 16384), "135m": (0, 0, 49152)}
"""Layers, width and vocabulary of random models; the last one is the real model."""


def measure_growth(name: str, bench: Bench, models: Path) -> tuple[list[Result], list[str]]:
    """The points of one curve, as rows: ``ratio`` is the cost over the first point's."""
    return GROWTH[name](bench, models), []


def rollout_rates(bench: Bench, models: Path) -> list[Result]:
    """Tokens a second by batch size and by length distribution; HF generate's at 16 beside it."""
    work = Work(model=str(real_model(models)), batch=16, response=32)
    rows = []
    with running(bench, ours("generate"), work) as mine, running(bench, hf(16, "HF generate, batch of 16"), work) as theirs:
        for lengths in ("fixed", "lognormal"):
            turns: list[dict[Any, Any]] = []
            for _ in range(TURNS + 1):
                turn = {batch: mine.step(batch=batch, lengths=lengths) for batch in BATCHES}
                turns.append({**turn, "peer": theirs.step(lengths=lengths)})
            for batch in BATCHES:
                values = [rate(turn[batch]) / rate(turn["peer"]) for turn in turns[1:]]
                answers = [[turn[side] for turn in turns[1:]] for side in (batch, "peer")]
                row = point(f"rollout_135m_rate_b{batch}_{lengths}", values, "our tokens/s over the peer's, which has a batch of 16")
                sides = {"ours": figures("alignkit", answers[0]), "theirs": figures("HF generate, batch of 16", answers[1])}
                decoding = sides["ours"]["tokens"] / sides["ours"]["parts"]["decode"]
                rates = {"ours": rate(sides["ours"]), "decoding": decoding, "theirs": rate(sides["theirs"])}
                if lengths == "fixed":
                    row |= {"curve": "growth_rollout_135m_batch", "axis": "responses at once", "x": batch}
                rows.append({**row, **sides, "better": "higher", "peer": "HF generate, batch of 16", "tokens_per_second": rates})
    return rows


def sft_by_batch(bench: Bench, models: Path) -> list[Result]:
    work = Work(model=str(real_model(models)), batch=1, lengths="fixed")
    return curve(bench, ours("sft"), work, "growth_sft_135m_batch", "demonstrations a step", [{"batch": n} for n in (1, 4, 8, 16)])


def sft_by_length(bench: Bench, models: Path) -> list[Result]:
    work = Work(model=str(real_model(models)), batch=4, lengths="fixed")
    points = [{"prompt": n // 2, "response": n // 2, "seed": n} for n in (32, 128, 256, 512)]
    return curve(bench, ours("sft"), work, "growth_sft_135m_length", "longest sequence, tokens", points, at=lambda p: 2 * p["response"])


def reward_by_k(bench: Bench, models: Path) -> list[Result]:
    work = Work(model=str(real_model(models)), batch=1, k=2, lengths="fixed")
    return curve(bench, ours("reward"), work, "growth_reward_135m_k", "responses of a prompt", [{"k": n} for n in (2, 4, 6, 9)])


def rollout_by_length(bench: Bench, models: Path) -> list[Result]:
    work = Work(model=str(real_model(models)), batch=16, response=16, lengths="fixed")
    points = [{"response": n} for n in (16, 64, 128)]
    return curve(bench, ours("generate"), work, "growth_rollout_135m_length", "tokens of each response", points)


def sft_by_size(bench: Bench, models: Path) -> list[Result]:
    rows: list[Result] = []
    for name, (layers, hidden, vocabulary) in SIZES.items():
        folder = random_model(models, name, layers=layers, hidden=hidden, vocabulary=vocabulary) if layers else real_model(models)
        work = Work(model=str(folder), batch=8, lengths="fixed", vocabulary=vocabulary)
        with running(bench, ours("sft"), work) as worker:
            _, *turns = [worker.step() for _ in range(TURNS + 1)]
        rows.append(of_turns("growth_sft_size", name, parameters(folder) / 1e6, "parameters, millions", turns))
    return relative(rows)


def memory_of_long_rows(bench: Bench, models: Path) -> list[Result]:
    """The peak of SFT at B=8, T=512, in a process that does nothing else."""
    work = Work(model=str(real_model(models)), batch=8, prompt=64, response=448, lengths="fixed")
    with running(bench, ours("sft"), work) as worker:
        start, turns = worker.facts(), [worker.step() for _ in range(2)]
    row = point("memory_sft_135m_b8_t512", [turns[-1]["peak_mb"]], "peak resident memory, MB")
    training = 12 * parameters(Path(work.model)) / 1e6
    note = f"{start['rss_mb']:.0f} MB of it before the first step, {training:.0f} MB for moments and gradients"
    return [{**row, "ours": figures("alignkit", turns), "note": note}]


def leak(bench: Bench, models: Path) -> list[Result]:
    """Resident memory after 220 PPO iterations of the tiny model, less that after 20."""
    work = Work(model=str(random_model(models)), batch=4, prompt=8, response=8, minibatches=2, vocabulary=2048)
    with running(bench, ours("ppo"), work) as worker:
        turns = [worker.step() for _ in range(220)]
    row = point("leak_tiny_200_iterations", [turns[-1]["rss_mb"] - turns[19]["rss_mb"]], "MB more after 200 further PPO iterations")
    return [{**row, "ours": figures("alignkit", turns[-50:])}]


GROWTH: Mapping[str, Callable[[Bench, Path], list[Result]]] = {
    "rollout_135m_rate": rollout_rates,
    "growth_sft_135m_batch": sft_by_batch,
    "growth_sft_135m_length": sft_by_length,
    "growth_reward_135m_k": reward_by_k,
    "growth_rollout_135m_length": rollout_by_length,
    "growth_sft_size": sft_by_size,
    "memory_sft_135m_b8_t512": memory_of_long_rows,
    "leak_tiny_200_iterations": leak,
}
"""By the name to ask for; the rows of a curve have the value of their point behind it."""


def curve(
    bench: Bench,
    side: Side,
    work: Work,
    name: str,
    axis: str,
    points: Sequence[dict[str, int]],
    *,
    at: Callable[[Mapping[str, int]], int] = lambda changed: next(iter(changed.values())),
) -> list[Result]:
    """One worker, all points of a curve in turn, after one round to warm up."""
    with running(bench, side, work) as worker:
        rounds = [[worker.step(**changed) for changed in points] for _ in range(TURNS + 1)][1:]
    return relative([of_turns(name, at(p), at(p), axis, [one[i] for one in rounds]) for i, p in enumerate(points)])


def of_turns(name: str, label: object, x: float, axis: str, turns: Sequence[Mapping[str, Any]]) -> Result:
    row = point(f"{name}_{label}", [turn["seconds"] for turn in turns], "time over the first point's")
    return {**row, "curve": name, "axis": axis, "x": x, "ours": figures("alignkit", turns)}


def relative(rows: Sequence[Result]) -> list[Result]:
    """Costs over the first point's."""
    base = rows[0]["ratio"]
    return [{**row, **{key: row[key] / base for key in ("ratio", "low", "high")}} for row in rows]


def point(name: str, values: Sequence[float], metric: str) -> Result:
    """A row without a peer and without a bar."""
    middle = statistics.median(values)
    empty = {"peer": "", "precision": "fp32", "must": None, "aim": None, "note": "", "theirs": None}
    return {
        "name": name, "metric": metric, "better": "lower", "ratio": middle, "low": min(values), "high": max(values), "pairs": len(values),
        **empty,
    }  # fmt: skip


def growth_figure(rows: Sequence[Result]) -> str | None:
    """All curves, each beside what would be proportional to its axis; None without any."""
    names = dict.fromkeys(row["curve"] for row in rows if "curve" in row)
    if not names:
        return None
    width, height, columns = 340, 190, 2
    panels = []
    for i, name in enumerate(names):
        some = [row for row in rows if row.get("curve") == name]
        measured = Series("measured", [(row["x"], row["ours"]["seconds"]) for row in some])
        slope = some[-1]["ours"]["seconds"] / some[-1]["x"]
        proportional = Series("proportional", [(row["x"], slope * row["x"]) for row in some])
        title = name.removeprefix("growth_").replace("_", " ")
        chart = line_chart([measured, proportional], title=title, x_title=f"{title}: {some[0]['axis']} (seconds)")
        place = f'x="{width * (i % columns)}" y="{height * (i // columns)}" width="{width}" height="{height}"'
        panels.append(chart.replace("<svg ", f"<svg {place} ", 1))
    tall = height * -(-len(names) // columns)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width * columns} {tall}" width="{width * columns}" height="{tall}">'
    return f"{head}<style>{STYLE}</style>{''.join(panels)}</svg>\n"


@contextmanager
def running(bench: Bench, side: Side, work: Work) -> Iterator[Worker]:
    """A worker that has loaded everything."""
    worker = bench.worker(side, asdict(work))
    try:
        worker.facts()
        yield worker
    finally:
        worker.stop()


def rate(answer: Mapping[str, Any]) -> float:
    return float(answer["tokens"] / answer["seconds"])


def parameters(folder: Path) -> int:
    """Weights of a transformers folder, tied ones once."""
    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names: list[str] = tensors.keys()
            for name in names:
                count = 1
                for size in tensors.get_slice(name).get_shape():
                    count *= size
                total += count
    return total
