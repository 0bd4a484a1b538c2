"""Who did what: rows that each hold the hash of the one before, so that none can be changed, removed or moved without a trace.

Only the newest rows can be cut off unseen; who fears that keeps the newest hash elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, insert, select

from alignkit_serve.store.tables import audit, fields_of
from alignkit_serve.store.values import json_text, plain

_BEGINNING = "0" * 64


@dataclass(frozen=True, slots=True)
class Entry:
    """One row; ``seq`` counts from 1 without gaps."""

    seq: int
    at: datetime
    actor: str
    action: str
    object: str
    detail: Mapping[str, Any]
    prev_hash: str
    hash: str


def record(connection: Connection, actor: str, action: str, object: str, detail: Mapping[str, Any]) -> Entry:
    """Append a row. The transaction is the only one that writes, so that no other takes the same place in the chain."""
    last = connection.execute(select(audit.c.seq, audit.c.hash).order_by(audit.c.seq.desc()).limit(1)).one_or_none()
    seq, prev_hash = (last.seq + 1, last.hash) if last else (1, _BEGINNING)
    row = {"seq": seq, "at": datetime.now(UTC), **plain({"actor": actor, "action": action, "object": object, "detail": detail})}
    entry = Entry(**row, prev_hash=prev_hash, hash=_hash(prev_hash, row))
    connection.execute(insert(audit), fields_of(entry))
    return entry


def verify(connection: Connection) -> str | None:
    """The first row at which the chain is broken, in words; None if it holds."""
    prev_hash = _BEGINNING
    rows = connection.execute(select(audit).order_by(audit.c.seq).execution_options(yield_per=1000))
    for seq, entry in enumerate((Entry(*row) for row in rows), start=1):
        if entry.seq != seq:
            return f"row {seq} of the audit is missing: the next one is {entry.seq}"
        if entry.prev_hash != prev_hash:
            return f"row {seq} of the audit is out of order: it does not follow the row before it as that is now"
        if entry.hash != _hash(prev_hash, {name: getattr(entry, name) for name in ("seq", "at", "actor", "action", "object", "detail")}):
            return f"row {seq} of the audit was changed after it was written"
        prev_hash = entry.hash
    return None


def entries(connection: Connection, limit: int) -> list[Entry]:
    """The newest rows, newest first."""
    return [Entry(*row) for row in connection.execute(select(audit).order_by(audit.c.seq.desc()).limit(limit))]


def latest(connection: Connection, action: str) -> Entry | None:
    """The newest row of one action."""
    row = connection.execute(select(audit).where(audit.c.action == action).order_by(audit.c.seq.desc()).limit(1)).one_or_none()
    return Entry(*row) if row else None


def _hash(prev_hash: str, row: Mapping[str, Any]) -> str:
    return hashlib.sha256((prev_hash + json_text({**row, "at": row["at"].isoformat(timespec="microseconds")})).encode()).hexdigest()
