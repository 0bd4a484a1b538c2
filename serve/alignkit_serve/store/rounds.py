"""Training rounds: which exports made which policy out of which, how it did, and whether it was promoted.

What is recorded of a round stays as it is, but for one thing: it may be promoted later than it was recorded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, insert, select, update
from sqlalchemy.sql import ColumnElement

from alignkit_serve.store import policies
from alignkit_serve.store.errors import StoreError
from alignkit_serve.store.tables import export, policy_version, round_export, training_round
from alignkit_serve.store.values import plain


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One way from a parent policy to its child. ``exports``: the ids of what it was trained on; ``metrics``: what the gate found."""

    id: str
    name: str
    config_sha256: str
    git_sha: str | None
    parent_policy_id: str
    child_policy_id: str
    promoted: bool
    metrics: Mapping[str, Any]
    started_at: datetime
    finished_at: datetime
    exports: tuple[str, ...]

    def storable(self) -> Round:
        """As it comes back from the store, so that it is compared with what is there."""
        return replace(
            self,
            metrics=plain(self.metrics),
            exports=tuple(sorted(set(self.exports))),
            started_at=self.started_at.astimezone(UTC),
            finished_at=self.finished_at.astimezone(UTC),
        )


_COLUMNS = [training_round.c[name] for name in Round.__dataclass_fields__ if name != "exports"]


def add(connection: Connection, made: Round) -> tuple[Round, bool]:
    """Record a round; the round as it is recorded, and whether that is any news.

    The same again, by name and child, is the same round; if it was not promoted, it can become so. The child's parent and evaluation are
    those of the round from then on. Raises ``StoreError`` for policies and exports that are unknown, for an export with erased feedback,
    for a child that came from another parent, and where the same round was recorded with something else.
    """
    made = made.storable()
    before = known(connection, made.name, made.child_policy_id)
    if before is not None:
        _check_same(before, made)
        if before.promoted == made.promoted:
            return before, False
    _check_policies(connection, made)
    _check_exports(connection, made.exports)
    if before is not None:
        connection.execute(update(training_round).where(training_round.c.id == before.id).values(promoted=True))
        return replace(before, promoted=True), True
    connection.execute(insert(training_round), {column.name: getattr(made, column.name) for column in _COLUMNS})
    if made.exports:
        connection.execute(insert(round_export), [{"round_id": made.id, "export_id": id} for id in made.exports])
    origin = {"parent_id": made.parent_policy_id, "evaluation": made.metrics}
    connection.execute(update(policy_version).where(policy_version.c.id == made.child_policy_id).values(origin))
    return made, True


def get(connection: Connection, id: str) -> Round | None:
    """By id."""
    return next(iter(_found(connection, training_round.c.id == id)), None)


def known(connection: Connection, name: str, child_policy_id: str) -> Round | None:
    """By name and child."""
    return next(iter(_found(connection, training_round.c.name == name, training_round.c.child_policy_id == child_policy_id)), None)


def listed(connection: Connection) -> list[Round]:
    """All, the oldest first."""
    return _found(connection)


def of_policies(connection: Connection, ids: Collection[str]) -> list[Round]:
    """Those that made these policies, the oldest first."""
    return _found(connection, training_round.c.child_policy_id.in_(ids))


def of_exports(connection: Connection, ids: Collection[str]) -> list[Round]:
    """Those that were trained on any of these exports, the oldest first."""
    return _found(connection, training_round.c.id.in_(select(round_export.c.round_id).where(round_export.c.export_id.in_(ids))))


def _found(connection: Connection, *conditions: ColumnElement[bool]) -> list[Round]:
    rows = connection.execute(select(*_COLUMNS).where(*conditions).order_by(training_round.c.id)).all()
    exports: dict[str, list[str]] = {row.id: [] for row in rows}
    used = select(round_export).join(training_round).where(*conditions).order_by(round_export.c.export_id)
    for round_id, export_id in connection.execute(used):
        exports[round_id].append(export_id)
    return [Round(**row._mapping, exports=tuple(exports[row.id])) for row in rows]


def _check_same(before: Round, made: Round) -> None:
    own = ("id", "promoted")
    different = [name for name in Round.__dataclass_fields__ if name not in own and getattr(before, name) != getattr(made, name)]
    if different:
        raise StoreError(
            f"round {made.name!r} of policy {made.child_policy_id!r} is recorded as {before.id!r} with another {different[0]}: "
            f"{getattr(before, different[0])!r}, not {getattr(made, different[0])!r}; a round that was run again needs another name"
        )
    if before.promoted and not made.promoted:
        raise StoreError(f"round {made.name!r} is recorded as {before.id!r}, and its policy was promoted; roll back to undo that")


def _check_policies(connection: Connection, made: Round) -> None:
    versions = policies.listed(connection)
    by_id = {version.id: version for version in versions}
    for id in (made.parent_policy_id, made.child_policy_id):
        if id not in by_id:
            raise StoreError(f"there is no policy with the id {id!r}; stage it first: POST /v1/admin/policies")
    parent, child = by_id[made.parent_policy_id], by_id[made.child_policy_id]
    if child.parent_id not in (None, parent.id):
        raise StoreError(f"policy {child.name!r} came from {child.parent_id!r}, and cannot have come from {parent.name!r} too")
    if child in (parent, *policies.ancestors(versions, parent.id)):
        raise StoreError(f"policy {child.name!r} cannot have come from {parent.name!r}, which is the same or came from it")


def _check_exports(connection: Connection, ids: Sequence[str]) -> None:
    found = {row.id: row for row in connection.execute(select(export.c.id, export.c.name, export.c.tainted_at).where(export.c.id.in_(ids)))}
    for id in ids:
        if id not in found:
            raise StoreError(f"there is no export with the id {id!r}; GET /v1/exports lists them")
        if found[id].tainted_at is not None:
            raise StoreError(
                f"export {found[id].name!r} ({id}) holds what was erased at {found[id].tainted_at:%Y-%m-%d %H:%M} and is in no round any "
                "more; make one under another name, and train anew"
            )
