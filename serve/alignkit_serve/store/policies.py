"""Versions of the policy, and which one answers: staged -> warm -> live -> draining -> retired, at most one of them live."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Connection, insert, select, update
from sqlalchemy.sql import ColumnElement

from alignkit_serve.store.errors import StoreError
from alignkit_serve.store.tables import fields_of, policy_version

State = Literal["staged", "warm", "live", "draining", "retired"]

_NEXT: Mapping[State, tuple[State, ...]] = {
    "staged": ("warm", "retired"),
    "warm": ("live", "retired"),
    "live": ("draining",),
    "draining": ("retired", "live"),
    "retired": ("staged",),
}


@dataclass(frozen=True, slots=True)
class PolicyVersion:
    """A policy's folder under a name, what it must hash to, and how it did in evaluation. A new one is staged."""

    id: str
    name: str
    base_model: str
    path: str
    template_sha256: str
    created_at: datetime
    parent_id: str | None = None
    manifest_sha256: str | None = None
    tokenizer_sha256: str | None = None
    state: State = "staged"
    evaluation: Mapping[str, Any] = field(default_factory=dict)


_COLUMNS = [policy_version.c[name] for name in PolicyVersion.__dataclass_fields__]


def register(connection: Connection, version: PolicyVersion) -> None:
    """Add a version. Raises ``StoreError`` for a name that is taken, and for one that is not staged: it gets on by ``move``."""
    if version.state != "staged":
        raise StoreError(f"policy {version.name!r} cannot be registered as {version.state}: a new version is staged; move it on from there")
    if by_name(connection, version.name):
        raise StoreError(f"there is a policy {version.name!r} already; give this one another name")
    connection.execute(insert(policy_version), fields_of(version))


def get(connection: Connection, id: str) -> PolicyVersion | None:
    """By id."""
    return _one(connection, policy_version.c.id == id)


def by_name(connection: Connection, name: str) -> PolicyVersion | None:
    """By name."""
    return _one(connection, policy_version.c.name == name)


def live(connection: Connection) -> PolicyVersion | None:
    """The one that answers now."""
    return _one(connection, policy_version.c.state == "live")


def listed(connection: Connection) -> list[PolicyVersion]:
    """All, in the order of their registration."""
    rows = connection.execute(select(*_COLUMNS).order_by(policy_version.c.created_at, policy_version.c.id))
    return [PolicyVersion(*row) for row in rows]


def ancestors(versions: Sequence[PolicyVersion], id: str) -> list[PolicyVersion]:
    """What a version came from, the nearest first."""
    known = {version.id: version for version in versions}
    found: list[PolicyVersion] = []
    at = known.get(id)
    while at is not None and (at := known.get(at.parent_id or "")) is not None:
        found.append(at)
    return found


def descendants(versions: Sequence[PolicyVersion], ids: Collection[str]) -> list[PolicyVersion]:
    """The versions with these ids and all that came from them, in the order of ``versions``."""
    found, more = set[str](), set(ids)
    while more:
        found |= more
        more = {version.id for version in versions if version.parent_id in more} - found
    return [version for version in versions if version.id in found]


def move(connection: Connection, id: str, state: State) -> None:
    """Change one version's state. Raises ``StoreError`` for a step that is none, and for a second live version: ``promote`` makes room."""
    version = _known(connection, id)
    if state not in _NEXT[version.state]:
        allowed = " or ".join(_NEXT[version.state])
        raise StoreError(f"policy {version.name!r} is {version.state} and cannot become {state}; allowed: {allowed}")
    if state == "live" and (other := live(connection)):
        raise StoreError(f"policy {version.name!r} cannot become live while {other.name!r} is; promote it, and the other is drained")
    _set(connection, id, state)


def promote(connection: Connection, id: str) -> None:
    """Make a warm or draining version the live one; what was live drains. Raises ``StoreError`` for a version in another state."""
    version = _known(connection, id)
    if "live" not in _NEXT[version.state]:
        raise StoreError(f"policy {version.name!r} is {version.state} and cannot be promoted; allowed: one that is warm or draining")
    if other := live(connection):
        _set(connection, other.id, "draining")
    _set(connection, id, "live")


def _set(connection: Connection, id: str, state: State) -> None:
    connection.execute(update(policy_version).where(policy_version.c.id == id).values(state=state))


def _known(connection: Connection, id: str) -> PolicyVersion:
    version = get(connection, id)
    if version is None:
        names = ", ".join(each.name for each in listed(connection)) or "none"
        raise StoreError(f"there is no policy with the id {id!r}; registered are: {names}")
    return version


def _one(connection: Connection, condition: ColumnElement[bool]) -> PolicyVersion | None:
    row = connection.execute(select(*_COLUMNS).where(condition)).one_or_none()
    return PolicyVersion(*row) if row else None
