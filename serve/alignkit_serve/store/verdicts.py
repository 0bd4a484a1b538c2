"""What was said of answers that several people may have judged, as the statistics of agreement read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, and_, func, or_, select

from alignkit_serve.store.tables import assignment, cmp_group, feedback, inference, label_task

Tiers = list[list[str]]
"""Completion ids from the best to the worst; those in one list are equally good."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """An active ranking or rating; a preference is a ranking of two. ``item``: its prompt's hash.

    ``ranks``: by completion, 1 is best; empty for a rating, of which ``target_id`` is the completion. ``slots``: the order in which the
    completions were shown, where that is known. ``page``: what showed them.
    """

    target_id: str
    item: str
    annotator_id: str
    ranks: Mapping[str, int]
    rating: int | None
    slots: tuple[str, ...]
    page: str
    dwell_ms: int | None


@dataclass(frozen=True, slots=True)
class Progress:
    """How many tasks and assignments there are by state, and how many assignments were submitted on each of the last days (UTC)."""

    tasks: Mapping[str, int]
    assignments: Mapping[str, int]
    days: Mapping[str, int]


def verdicts(connection: Connection) -> Iterator[Verdict]:
    """In the order in which they were given; what was superseded, retracted or quarantined is left out."""
    said = (feedback.c.kind, feedback.c.target_id, feedback.c.annotator_id, feedback.c.value, feedback.c.presentation, feedback.c.source)
    rated = and_(feedback.c.kind == "rating", feedback.c.target_type == "completion")
    of_group = and_(feedback.c.target_type == "group", feedback.c.target_id == cmp_group.c.id)
    found = (
        select(*said, func.coalesce(cmp_group.c.prompt_sha256, inference.c.prompt_sha256).label("item"))
        .outerjoin(cmp_group, of_group)
        .outerjoin(inference, feedback.c.inference_id == inference.c.id)
        .where(feedback.c.state == "active", or_(feedback.c.kind.in_(("ranking", "preference")), rated))
        .order_by(feedback.c.id)
    )
    for row in connection.execute(found):
        shown: Mapping[str, Any] = row.presentation or {}
        yield Verdict(
            target_id=row.target_id,
            item=row.item,
            annotator_id=row.annotator_id,
            ranks={id: rank for rank, tier in enumerate(_tiers(row.kind, row.value), start=1) for id in tier},
            rating=row.value if row.kind == "rating" else None,
            slots=tuple(shown.get("slots", ())),
            page=shown.get("ui_version", row.source),
            dwell_ms=shown.get("dwell_ms"),
        )


def gold(connection: Connection) -> dict[str, Tiers]:
    """The right ranking of each group that has one, by group."""
    found = select(label_task.c.group_id, label_task.c.gold).where(label_task.c.gold.is_not(None), label_task.c.state != "withdrawn")
    return {group_id: tiers for group_id, tiers in connection.execute(found)}


def progress(connection: Connection, *, since: datetime) -> Progress:
    """Of all tasks; days from ``since`` on."""
    tasks, assignments = (
        {state: count for state, count in connection.execute(select(table.c.state, func.count()).group_by(table.c.state))}
        for table in (label_task, assignment)
    )
    done = select(assignment.c.finished_at).where(assignment.c.state == "submitted", assignment.c.finished_at >= since)
    days = Counter(at.date().isoformat() for at in connection.scalars(done) if at)
    return Progress(tasks, assignments, dict(sorted(days.items())))


def _tiers(kind: str, value: Any) -> Tiers:
    if kind == "ranking":
        tiers: Tiers = value
        return tiers
    if kind == "rating":
        return []
    a, b = value["a"], value["b"]
    return {"a": [[a], [b]], "b": [[b], [a]]}.get(value["choice"], [[a, b]])
