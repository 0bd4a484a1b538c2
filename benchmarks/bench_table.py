"""From seconds to rows, and from rows to tables. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.bench_rows import Group, Row

Answer = Mapping[str, Any]
Result = dict[str, Any]
UNITS = {"time": "peer's time / ours", "memory": "our memory / the peer's", "error": "largest difference, nats"}
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lowest, highest."""
    return statistics.median(values), min(values), max(values)


def result(row: Row, group: Group, turns: Sequence[Mapping[str, Answer]], first: Mapping[str, Answer]) -> Result:
    """One row from the answers of each turn, by side; ``first``: of the warm-up."""
    side = group.sides[row.side]
    peer = group.sides[row.peer] if row.peer else None
    mine = [turn[row.side] for turn in turns]
    theirs = [turn[row.peer] for turn in turns] if row.peer else []
    if row.metric == "error":
        values = [float(first[row.side]["logprob_error"])]
    elif row.metric == "memory":
        values = [a / b for a, b in zip(map(memory_of, mine), map(memory_of, theirs), strict=True)]
        # A peak never falls: the last turn's is the process's.
        values = values if group.fresh else values[-1:]
    else:
        values = [b["seconds"] / a["seconds"] for a, b in zip(mine, theirs, strict=True)]
    median, low, high = spread(values)
    return {
        "name": row.name,
        "metric": UNITS[row.metric],
        "better": "higher" if row.metric == "time" else "lower",
        "ratio": median,
        "low": low,
        "high": high,
        "pairs": len(values),
        "peer": peer.label if peer else "",
        "precision": row.precision,
        "must": row.must,
        "aim": row.aim,
        "note": row.note,
        "ours": figures(side.label, mine),
        "theirs": figures(peer.label, theirs) if peer else None,
    }


def memory_of(answer: Answer) -> float:
    """MB: above the start, where a side measured that."""
    return float(answer.get("above_start_mb", answer["peak_mb"]))


def figures(label: str, answers: Sequence[Answer]) -> Result:
    """One side's medians: seconds, phases, tokens a second, and the peak."""
    seconds = statistics.median(answer["seconds"] for answer in answers)
    phases = {
        phase: round(statistics.median(answer["parts"][phase] for answer in answers), 4)
        for phase in answers[0].get("parts", {})
        if all(phase in answer["parts"] for answer in answers)
    }
    return {
        "label": label,
        "seconds": round(seconds, 4),
        "parts": phases,
        "tokens": answers[0]["tokens"],
        "peak_mb": round(max(map(memory_of, answers))),
    }


def unequal(group: Group, turns: Sequence[Mapping[str, Answer]]) -> list[str]:
    """Complaints about sides that did not do equally much."""
    found = []
    for row in group.rows:
        counts = {side: turn[side]["tokens"] for turn in turns for side in (row.side, row.peer) if side}
        if any(turn[side]["tokens"] != counts[side] for turn in turns for side in counts) or len(set(counts.values())) > 1:
            found.append(f"{row.name}: the sides did not do equally much: {counts}")
    return found


def inexact(group: Group, first: Mapping[str, Answer], bound: float = 1e-4) -> list[str]:
    """Complaints about recorded log-probabilities that the training forward, in float32, does not share."""
    return [
        f"{group.rows[0].name}: {group.sides[side].label}: recorded log-probabilities are {error:.2g} nats off the training forward"
        for side in group.checked
        if group.sides[side].options["precision"] == "float32" and not (error := first[side]["logprob_error"]) <= bound
    ]


def reached(row: Result) -> str:
    """Whether a row reaches its bars."""
    if row["must"] is None:
        return ""
    higher = row["better"] == "higher"
    passed = [bar is not None and (row["ratio"] >= bar if higher else row["ratio"] <= bar) for bar in (row["must"], row["aim"])]
    return "aim" if passed[1] else "must" if passed[0] else "**no**"


def number(value: float | None) -> str:
    """Three digits; nothing for what is not there."""
    if value is None:
        return ""
    return f"{value:.1e}" if value and abs(value) < 1e-3 else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def interval(row: Result) -> str:
    """The spread of a row."""
    return f"{number(row['low'])} to {number(row['high'])}"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table, columns but the first aligned to the right; nothing without lines."""
    if not lines:
        return ""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines)) + "\n"


def ratios(rows: Sequence[Result]) -> str:
    """The table of rows that have a peer, or a bar."""
    lines = [
        [
            f"`{row['name']}`", number(row["ratio"]), interval(row), str(row["pairs"]),
            number(row["must"]), number(row["aim"]), reached(row), row["peer"], row["precision"],
        ]
        for row in rows
    ]  # fmt: skip
    return markdown(["row", "ratio", "spread", "pairs", "must", "aim", "reached", "peer", "precision"], lines)


def seconds(rows: Sequence[Result]) -> str:
    """The table of what was measured on either side."""
    lines = [
        [
            f"`{row['name']}`", str(mine["tokens"]), number(mine["parts"].get("prepare")),
            *(number(side[key]) for key in ("seconds", "peak_mb") for side in (mine, theirs)),
        ]
        for row in rows
        if (mine := row["ours"]) and (theirs := row["theirs"])
    ]  # fmt: skip
    return markdown(["row", "tokens or pairs", "s, preparing weights", "s, ours", "s, peer", "peak MB, ours", "peak MB, peer"], lines)


def phases(rows: Sequence[Result]) -> str:
    """The table of PPO's phases: seconds of ours and of the peer, and their ratio."""
    names = ("rollout", "scoring", "forward", "update")
    compared = [row for row in rows if "time" in row["metric"] and row["theirs"]]
    lines = []
    for row in compared:
        mine, theirs = row["ours"]["parts"], row["theirs"]["parts"]
        if mine.keys() & theirs.keys() >= set(names):  # else a step that is no iteration, such as a rollout alone
            lines.append([f"`{row['name']}`", *(f"{number(mine[p])} / {number(theirs[p])} = {number(theirs[p] / mine[p])}" for p in names)])
    return markdown(["row", *(f"{name}: s, ours / peer = ratio" for name in names)], lines)


def notes(rows: Sequence[Result]) -> str:
    """The rows' notes, as a list."""
    return "".join(f"- `{row['name']}`: {row['note']}\n" for row in rows if row["note"])


def merged(old: Sequence[Result], new: Sequence[Result]) -> list[Result]:
    """New rows in the place of the old ones of the same name, others behind."""
    fresh = {row["name"]: row for row in new}
    return [fresh.pop(row["name"], row) for row in old] + list(fresh.values())


def between_markers(page: str, text: str) -> str:
    """The page with ``text`` between its markers, and what people wrote around them as it was.

    A page without markers gets them at its end.
    """
    if BEGIN not in page or END not in page:
        page = f"{page.rstrip()}\n\n{BEGIN}\n{END}\n".lstrip()
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    return f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}"
