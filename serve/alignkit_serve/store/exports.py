"""Exports: each is a frozen, named set of rows, and which feedback is in which of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any

from sqlalchemy import Connection, insert, select

from alignkit_serve.dataset.filters import Shape, Split
from alignkit_serve.store.tables import export, export_row, feedback, fields_of, inference


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """``split_salt``: the hash of the secret that splits. ``path``: the folder. ``tainted_at``: since when something in it is erased."""

    id: str
    name: str
    shape: Shape
    split: Split
    rule_version: int
    filters: Mapping[str, Any]
    split_salt: str
    sha256: str
    n_rows: int
    counts: Mapping[str, Any]
    path: str
    created_at: datetime
    tainted_at: datetime | None = None


_COLUMNS = [export.c[name] for name in Export.__dataclass_fields__]
_AT_ONCE = 10_000


def add(connection: Connection, made: Export, rows: Iterable[tuple[frozenset[str], float]]) -> None:
    """Record an export, and which feedback each row is made of, with the row's weight. Rows are counted from 0, as in the file."""
    connection.execute(insert(export), fields_of(made))
    entries = (
        {"export_id": made.id, "row_no": number, "feedback_id": id, "weight": weight}
        for number, (ids, weight) in enumerate(rows)
        for id in sorted(ids)
    )
    for several in _batches(entries):
        connection.execute(insert(export_row), several)


def find(connection: Connection, name: str, shape: Shape, split: Split) -> Export | None:
    """By what it is known as."""
    row = connection.execute(select(*_COLUMNS).where(export.c.name == name, export.c.shape == shape, export.c.split == split)).one_or_none()
    return Export(**row._mapping) if row else None


def get(connection: Connection, id: str) -> Export | None:
    """By id."""
    row = connection.execute(select(*_COLUMNS).where(export.c.id == id)).one_or_none()
    return Export(**row._mapping) if row else None


def listed(connection: Connection) -> list[Export]:
    """All, the oldest first."""
    return [Export(**row._mapping) for row in connection.execute(select(*_COLUMNS).order_by(export.c.id))]


def erased(connection: Connection, id: str, inference_ids: Iterable[str]) -> bool:
    """Whether any of the feedback of an export is erased, or any of the inferences that its rows are made of."""
    said = select(1).select_from(export_row.join(feedback)).where(export_row.c.export_id == id, feedback.c.state == "erased").limit(1)
    if connection.scalar(said):
        return True
    gone = select(1).limit(1).where(inference.c.redaction == "erased")
    return any(connection.scalar(gone.where(inference.c.id.in_(some))) for some in _batches(inference_ids))


def _batches(items: Iterable[Any]) -> Iterator[list[Any]]:
    left = iter(items)
    while some := list(islice(left, _AT_ONCE)):
        yield some
