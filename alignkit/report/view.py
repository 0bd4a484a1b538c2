"""What the report shows of a run: which curves, in which order, under which names. The template only lays it out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.report.read import Points, RunRecord, StageRecord, Warned
from alignkit.report.svg import Series, frontier_chart, interval_bar, line_chart, number

REWARD, KL = "reward/score_mean", "kl/sequence_nats"

FIRST = (
    REWARD,
    KL,
    "response/length_tokens",
    "policy/entropy_nats",
    "response/finished_share",
    "loss/nll_nats",
    "loss/ranking_nats",
    "reward/accuracy",
    "loss/policy",
    "loss/critic",
    "critic/explained_variance",
    "policy/clip_share",
)
"""Figures shown at once, in this order; the others are a click away."""

UNITS = ("nats", "tokens", "seconds", "share", "mean", "std", "count", "bits", "bytes")


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawn figure with its words. ``now`` is the last value."""

    name: str
    unit: str
    now: str
    svg: str


@dataclass(frozen=True, slots=True)
class Change:
    """One row of before and after."""

    name: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class TextLosses:
    """What an evaluation found of held-out text: its stage, what was read, and rows of policy, loss and difference to the first."""

    name: str
    text: str
    rows: list[tuple[str, str, str]]


MARKED = {
    "length": ("response/length_tokens", "guard/length_correlation", "guard/length_ratio"),
    "repetition": ("guard/repetitive_share",),
    "duplicates": ("guard/duplicate_share",),
    "cut off": ("response/finished_share", "guard/cut_share"),
    "entropy": ("policy/entropy_nats", "guard/entropy_ratio"),
    "flat reward": ("reward/score_std", "guard/reward_std"),
    "proxy gap": (REWARD, "guard/judge_mean"),
    "kl": (KL,),
    "skipped step": ("optimizer/grad_norm", "guard/skipped_steps"),
}
"""The curves on which a guard's warning is marked."""


def charts(stage: StageRecord, warnings: Sequence[Warned] = ()) -> tuple[list[Chart], list[Chart]]:
    """The stage's main curves, and the others. A validation figure lies over its training figure; times share one chart.

    Each of the run's ``warnings`` is marked on the curves that it is about; a guard's figure that is always 0 is not drawn.
    """
    marks: dict[str, list[tuple[float, str]]] = {}
    for warned in warnings:
        for name in MARKED.get(warned.what, ()) if warned.stage == stage.name else ():
            marks.setdefault(name, []).append((float(warned.step), warned.what))
    held_out = {name: points for name, points in stage.metrics.items() if name.startswith("validation/")}
    times = {name: points for name, points in stage.metrics.items() if name.startswith("time/")}
    drawn: dict[str, Chart] = {}
    for name, points in stage.metrics.items():
        if name.startswith(("validation/", "time/")) or (name.startswith("guard/") and not any(value for _, value in points)):
            continue
        over = held_out.pop(f"validation/{name.replace('/', '_')}", None)
        series = [Series("training", points), Series("held out", over)] if over else [Series(name, points)]
        drawn[name] = _chart(name, series, marks.get(name, ()))
    for name, points in held_out.items():
        drawn[name] = _chart(name, [Series(name, points)])
    if times:
        seconds = [Series(name.removeprefix("time/").removesuffix("_seconds"), points) for name, points in times.items()]
        drawn["time/per_step_seconds"] = _chart("time/per_step_seconds", seconds[:4])
    main = [drawn[name] for name in FIRST if name in drawn]
    return main, [drawn[name] for name in sorted(drawn) if name not in FIRST]


def frontier(stage: StageRecord) -> str | None:
    """Reward against the KL that was spent on it, step by step; None for a stage that has no such figures."""
    reward = dict(stage.metrics.get(REWARD, ()))
    path: Points = [(kl, reward[step]) for step, kl in stage.metrics.get(KL, ()) if step in reward]
    steps = [step for step, _ in stage.metrics.get(KL, ()) if step in reward]
    if len(path) < 2:
        return None
    return frontier_chart(
        path,
        title=f"{stage.name}: reward against KL",
        x_title="KL to the reference, nats per response",
        first=f"step {number(steps[0])}",
        last=f"step {number(steps[-1])}",
    )


def win_rate_bar(comparison: Mapping[str, Any]) -> str | None:
    """The win rate between 0 and 1, with one half marked."""
    return _bar(comparison, ("win_rate", "ci95_low", "ci95_high"), ends=(0.0, 1.0), mark=0.5)


def gain_bar(comparison: Mapping[str, Any]) -> str | None:
    """The judge's gain, with zero marked."""
    gain = comparison.get("judge_gain_ci95_high") or 0.0
    reach = 1.1 * max(abs(gain), abs(comparison.get("judge_gain_ci95_low") or 0.0)) or 1.0  # no gain at all still needs an axis
    return _bar(comparison, ("judge_gain", "judge_gain_ci95_low", "judge_gain_ci95_high"), ends=(-reach / 4, reach), mark=0.0)


def changes(comparison: Mapping[str, Any]) -> list[Change]:
    """What else the alignment changed: rows of before and after, for what was measured."""
    rows = [
        ("judge's mean score", "judge_mean", number),
        ("response length, tokens", "response_length_tokens", number),
        ("ended by themselves", "finished_share", percent),
        ("different word pairs (distinct-2)", "distinct_2", percent),
        ("without a score", "unscored", number),
    ]
    return [
        Change(name, show(comparison[f"{key}_before"]), show(comparison[f"{key}_after"]))
        for name, key, show in rows
        if f"{key}_after" in comparison
    ]


def data_counts(stages: Iterable[StageRecord]) -> list[tuple[str, str, dict[str, str]]]:
    """Stage, use (training or validation) and every count that the manifest has of the rows."""
    return [
        (stage.name, use, {key: number(value) for key, value in report.items() if isinstance(value, int | float)})
        for stage in stages
        for use, report in stage.manifest.get("data", {}).items()
    ]


def text_losses(run: RunRecord) -> list[TextLosses]:
    """The evaluations that read held-out text."""
    return [
        TextLosses(
            stage.name,
            f"nats per token; {number(stage.evaluation['documents'])} documents, {number(stage.evaluation['tokens'])} tokens",
            [
                (entry["policy"], _nats(entry["loss_nats"]), _difference(entry) if i else "")
                for i, entry in enumerate(stage.evaluation["text_loss"])
            ],
        )
        for stage in run.stages
        if "text_loss" in stage.evaluation
    ]


def other_figures(run: RunRecord) -> list[tuple[str, dict[str, str]]]:
    """The figures of the evaluations that the report has no better place for: other kinds, and win rates before the last one."""
    return [
        (_titled(stage), {key: number(value) for key, value in stage.evaluation.items() if isinstance(value, int | float)})
        for stage in run.stages
        if stage.evaluation and stage.evaluation is not run.comparison and "text_loss" not in stage.evaluation
    ]


def percent(share: float | None) -> str:
    """A share for people."""
    return "–" if share is None else f"{100.0 * share:.0f}%"


def duration(seconds: float | None) -> str:
    """Seconds for people."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.{0 if seconds >= 10 else 1}f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def _titled(stage: StageRecord) -> str:
    """The stage's name, and of a comparison also who was compared."""
    found = stage.evaluation
    return f"{stage.name}: {found['candidate']} over {found['baseline']}" if "win_rate" in found else stage.name


def _difference(entry: Mapping[str, Any]) -> str:
    """A difference with its interval."""
    value, low, high = (_nats(entry[f"difference_{part}nats"], sign="+") for part in ("", "ci95_low_", "ci95_high_"))
    return f"{value} ({low} to {high})"


def _nats(value: float | None, sign: str = "") -> str:
    """Nats to three decimals: losses of a few nats differ by hundredths."""
    return "–" if value is None else f"{value:{sign}.3f}".replace("-", "−")


def _chart(name: str, series: Sequence[Series], marks: Sequence[tuple[float, str]] = ()) -> Chart:
    area, _, rest = name.partition("/")
    words, _, unit = rest.rpartition("_")
    if unit not in UNITS or not words:
        words, unit = rest, ""
    now = number(series[0].points[-1][1])
    return Chart(f"{area} / {words.replace('_', ' ')}", unit, now, line_chart(series, title=name, marks=marks))


def _bar(comparison: Mapping[str, Any], keys: tuple[str, str, str], *, ends: tuple[float, float], mark: float) -> str | None:
    value, low, high = (comparison.get(key) for key in keys)
    if value is None or low is None or high is None:
        return None
    title = f"{number(value)}, 95% interval {number(low)} to {number(high)}"
    return interval_bar(value, low, high, ends=ends, mark=mark, title=title)
