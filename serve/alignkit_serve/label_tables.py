"""The tables of a labelling as CSV, so that nothing in them is a formula to the spreadsheet that opens them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Literal

from alignkit_serve.consensus import Consensus
from alignkit_serve.store.pool import Pooled

Cell = str | int | float | None

_HEADS = {
    "annotators": (
        "annotator_id",
        "rankings",
        "ratings",
        "pairs",
        "agreement",
        "agreement_of",
        "gold",
        "gold_of",
        "ties",
        "dwell_seconds",
        "same",
        "tie",
        "reversed",
        "tied",
        "split",
    ),
    "tasks": (
        "task_id",
        "group_id",
        "prompt_sha256",
        "origin",
        "tag",
        "completions",
        "priority",
        "overlap",
        "gold",
        "state",
        "leased",
        "submitted",
        "skipped",
        "lapsed",
        "created_at",
    ),
    "pairs": ("prompt_sha256", "a", "b", "a_better", "tie", "b_better"),
}

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def annotators(found: Consensus) -> list[list[Cell]]:
    """One row each; what rests on nothing is empty."""
    return [
        [
            each.id,
            each.rankings,
            each.ratings,
            each.ties.of,
            each.agreement.value,
            each.agreement.of,
            each.gold.value,
            each.gold.of,
            each.ties.value,
            each.dwell_seconds,
            each.confusion.same,
            each.confusion.tie,
            each.confusion.reversed,
            each.confusion.tied,
            each.confusion.split,
        ]
        for each in found.annotators
    ]


def pairs(found: Consensus) -> list[list[Cell]]:
    """One row for two answers that somebody compared."""
    return [[pair.item, pair.a, pair.b, pair.better, pair.tie, pair.worse] for pair in found.pairs]


def task(found: Pooled) -> list[Cell]:
    """The row of one task."""
    return [
        found.task.id,
        found.task.group_id,
        found.prompt_sha256,
        found.origin,
        found.tag,
        len(found.completion_ids),
        found.task.priority,
        found.task.overlap,
        "yes" if found.task.gold else "no",
        found.task.state,
        *(found.assignments.get(state, 0) for state in ("leased", "submitted", "skipped", "lapsed")),
        found.task.created_at.isoformat(),
    ]


def csv_text(table: Literal["annotators", "tasks", "pairs"], rows: Iterable[Sequence[Cell]]) -> str:
    """RFC 4180. Text that a spreadsheet would take for a formula begins with an apostrophe (OWASP, "CSV Injection")."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(_HEADS[table])
    writer.writerows([f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell for cell in row] for row in rows)
    return out.getvalue()
