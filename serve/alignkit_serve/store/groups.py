"""Candidates to compare: completions of one prompt, each in the slot in which it was shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import Connection, insert, select

from alignkit_serve.store.tables import cmp_candidate, cmp_group

Origin = Literal["ab", "shadow", "n", "label_pool", "import"]


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Group:
    """``candidates`` are (completion id, slot), by slot. ``presentation``: how the slots were drawn, where they were."""

    id: str
    prompt_sha256: str
    origin: Origin
    presentation: Mapping[str, Any] | None
    inference_id: str | None
    candidates: tuple[tuple[str, int], ...]
    created_at: datetime = field(default_factory=_now)


def add_group(connection: Connection, group: Group) -> None:
    """Add a group of completions that are stored already."""
    connection.execute(insert(cmp_group), {column.name: getattr(group, column.name) for column in cmp_group.c})
    candidates = [{"group_id": group.id, "slot": slot, "completion_id": completion_id} for completion_id, slot in group.candidates]
    connection.execute(insert(cmp_candidate), candidates)


def get_group(connection: Connection, id: str) -> Group | None:
    """By id."""
    row = connection.execute(select(cmp_group).where(cmp_group.c.id == id)).one_or_none()
    if row is None:
        return None
    mine = select(cmp_candidate.c.completion_id, cmp_candidate.c.slot).where(cmp_candidate.c.group_id == id).order_by(cmp_candidate.c.slot)
    candidates = tuple((completion_id, slot) for completion_id, slot in connection.execute(mine))
    return Group(**row._mapping, candidates=candidates)
