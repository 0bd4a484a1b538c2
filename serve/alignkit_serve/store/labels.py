"""Who ranks what: tasks, and the assignments by which each is given to as many people as it needs and to nobody twice.

An assignment is leased for a while; a lease that is not renewed runs out, and its place goes to somebody else. What people then say is
feedback like any other. Every change locks its task, so that leased and submitted assignments never exceed the overlap.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from sqlalchemy import Connection, Row, Select, and_, case, exists, func, insert, literal, or_, select, update
from sqlalchemy.sql import ColumnElement

from alignkit_serve.store import annotators
from alignkit_serve.store.annotators import Author
from alignkit_serve.store.errors import StoreError
from alignkit_serve.store.feedback import Feedback
from alignkit_serve.store.groups import get_group
from alignkit_serve.store.ids import new_id
from alignkit_serve.store.tables import assignment, cmp_candidate, completion, feedback, fields_of, inference, label_task
from alignkit_serve.store.values import plain

TaskState = Literal["open", "done", "withdrawn"]
AssignmentState = Literal["leased", "submitted", "skipped", "lapsed"]

LEASE = timedelta(minutes=10)
"""How long an assignment is somebody's without a sign of life."""

UNDO = timedelta(minutes=10)
"""How long what was submitted can be opened again."""

_GOLD_ONE_IN = 20
"""Of so many tasks that somebody takes, one is gold, as long as there is any."""


class UnknownAssignment(StoreError):
    """There is no such assignment of this annotator; whether there is one of somebody else's is nobody's business."""


class NotHeld(StoreError):
    """The assignment is the annotator's, but no longer theirs to work on."""


@dataclass(frozen=True, slots=True)
class Task:
    """A group to be ranked by ``overlap`` people. ``gold``: tiers of completion ids, best first, where the right ranking is known."""

    id: str
    group_id: str
    priority: int
    overlap: int
    gold: tuple[tuple[str, ...], ...] | None
    state: TaskState
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Counted:
    """A task, and how many assignments it has in the states that tell how far it is."""

    task: Task
    leased: int
    submitted: int
    skipped: int


@dataclass(frozen=True, slots=True)
class Assignment:
    """A task given to one annotator. ``slots``: the completion ids, in the order that was drawn from ``seed`` and is shown.

    One that is leased and has a ``finished_at`` was submitted before, and is open again to be changed.
    """

    id: str
    task_id: str
    annotator_id: str
    state: AssignmentState
    seed: int
    slots: tuple[str, ...]
    draft: Any
    reason: str | None
    lease_until: datetime
    started_at: datetime
    finished_at: datetime | None


@dataclass(frozen=True, slots=True)
class Material:
    """What is shown of an assignment: the prompt's messages, and the answers' texts by slot. ``group_id``: what the ranking is about."""

    group_id: str
    messages: Sequence[dict[str, str]]
    texts: tuple[str, ...]


# Within the statement, and not beside it: an index of some rows is used only where the statement itself says that it is about those.
_OPEN = label_task.c.state == literal("open", literal_execute=True)
_LEASED = assignment.c.state == literal("leased", literal_execute=True)

_TASK = [label_task.c[name] for name in Task.__dataclass_fields__]
_ASSIGNMENT = [assignment.c[name] for name in Assignment.__dataclass_fields__]


def add_task(
    connection: Connection, group_id: str, *, overlap: int, priority: int = 0, gold: Sequence[Sequence[str]] | None = None
) -> Task:
    """The task of a group, made if there is none. Raises ``StoreError`` for what cannot be ranked, and where there is a different one."""
    tiers = None if gold is None else tuple(tuple(tier) for tier in gold)
    found = connection.execute(select(*_TASK).where(label_task.c.group_id == group_id)).one_or_none()
    if found is not None:
        before = _task(found)
        if (before.overlap, before.priority, before.gold) != (overlap, priority, tiers):
            raise StoreError(
                f"group {group_id!r} has the task {before.id!r} already, with overlap {before.overlap}, priority {before.priority} and "
                f"{'a' if before.gold else 'no'} gold ranking; a group has one task: leave it, or make another group"
            )
        return before
    _check_task(connection, group_id, overlap, tiers)
    made = Task(new_id("task-"), group_id, priority, overlap, tiers, "open", datetime.now(UTC))
    connection.execute(insert(label_task), fields_of(made))
    return made


def get_task(connection: Connection, id: str) -> Task | None:
    """By id."""
    row = connection.execute(select(*_TASK).where(label_task.c.id == id)).one_or_none()
    return _task(row) if row else None


def tasks(
    connection: Connection, *, state: TaskState | None = None, after: str | None = None, limit: int = 20
) -> tuple[list[Counted], bool]:
    """``limit`` tasks with their counts, oldest first, and whether there are more."""
    counts = [func.count(case((assignment.c.state == each, 1))).label(each) for each in ("leased", "submitted", "skipped")]
    found = select(*_TASK, *counts).outerjoin(assignment).group_by(label_task.c.id).order_by(label_task.c.id).limit(limit + 1)
    if state is not None:
        found = found.where(label_task.c.state == state)
    if after is not None:
        found = found.where(label_task.c.id > after)
    rows = connection.execute(found).all()
    return [Counted(_task(row), row.leased, row.submitted, row.skipped) for row in rows[:limit]], len(rows) > limit


def withdraw(connection: Connection, id: str) -> Task:
    """Give a task to nobody any more; what was said stays. Raises ``StoreError`` where there is none."""
    found = get_task(connection, id)
    if found is None:
        raise StoreError(f"there is no task {id!r}")
    connection.execute(update(label_task).where(label_task.c.id == id).values(state="withdrawn"))
    _end(connection, assignment.c.task_id == id)
    return replace(found, state="withdrawn")


def next_assignment(connection: Connection, author: Author, now: datetime) -> Assignment | None:
    """What somebody is to work on: what they have begun, or else the open task of the highest priority that they never had."""
    lapse(connection, now)
    annotator = annotators.of(connection, author)
    if annotator.status == "blocked":
        return None
    if own := _begun(connection, annotator.id, now):
        return _lease(connection, own, now)
    seed = secrets.randbits(53)
    gold, ordinary = label_task.c.gold.is_not(None), label_task.c.gold.is_(None)
    kinds = (gold, ordinary) if seed % _GOLD_ONE_IN == 0 else (ordinary, gold)
    # One after the other: for both in one order the database would look at every task that there is.
    row = next((row for kind in kinds if (row := _first_new(connection, annotator.id, kind, now))), None)
    if row is None:
        return None
    group = get_group(connection, row.group_id)
    assert group is not None
    slots = [completion_id for completion_id, _ in group.candidates]
    random.Random(seed).shuffle(slots)
    made = Assignment(new_id("asg-"), row.id, annotator.id, "leased", seed, tuple(slots), None, None, now + LEASE, now, None)
    connection.execute(insert(assignment), fields_of(made))
    return made


def get(connection: Connection, id: str, author: Author) -> Assignment:
    """An annotator's own assignment. Raises ``UnknownAssignment``."""
    annotator = annotators.known(connection, author)
    mine = (assignment.c.id == id, assignment.c.annotator_id == annotator.id) if annotator else None
    row = connection.execute(select(*_ASSIGNMENT).where(*mine)).one_or_none() if mine else None
    if row is None:
        raise UnknownAssignment(f"there is no assignment {id!r} of this annotator")
    return _assignment(row)


def material(connection: Connection, given: Assignment) -> Material:
    """What is shown of an assignment."""
    group_id = connection.execute(select(label_task.c.group_id).where(label_task.c.id == given.task_id)).scalar_one()
    answers = select(completion.c.id, completion.c.text, inference.c.messages).join(inference).where(completion.c.id.in_(given.slots))
    found = {row.id: row for row in connection.execute(answers)}
    return Material(group_id, found[given.slots[0]].messages, tuple(found[id].text for id in given.slots))


def heartbeat(connection: Connection, id: str, author: Author, now: datetime) -> Assignment:
    """A sign of life: the lease is renewed. Raises ``UnknownAssignment``, and ``NotHeld`` where it ran out and the place is taken."""
    return _lease(connection, _held(connection, id, author, now), now)


def save_draft(connection: Connection, id: str, author: Author, draft: Any, now: datetime) -> Assignment:
    """Keep what was entered so far, and renew the lease. Raises as ``heartbeat`` does."""
    held = _held(connection, id, author, now)
    connection.execute(update(assignment).where(assignment.c.id == id).values(draft=draft))
    return _lease(connection, replace(held, draft=plain(draft)), now)


def skip(connection: Connection, id: str, author: Author, reason: str, now: datetime) -> Assignment:
    """Leave a task to others, for good. Raises as ``heartbeat`` does."""
    return _finish(connection, _held(connection, id, author, now), now, state="skipped", reason=reason)


def submit(connection: Connection, id: str, author: Author, draft: Any, now: datetime) -> Assignment:
    """Be done with it. ``draft``: what was entered, for when it is opened again. Raises as ``heartbeat`` does."""
    return _finish(connection, _held(connection, id, author, now), now, state="submitted", draft=plain(draft))


def undoable(connection: Connection, author: Author, now: datetime) -> Assignment | None:
    """What an annotator submitted last, as long as it can be opened again."""
    annotator = annotators.known(connection, author)
    if annotator is None:
        return None
    mine = (assignment.c.annotator_id == annotator.id, assignment.c.state == "submitted", assignment.c.finished_at > now - UNDO)
    found = select(*_ASSIGNMENT).join(label_task).where(*mine, label_task.c.state != "withdrawn")
    row = connection.execute(found.order_by(assignment.c.finished_at.desc()).limit(1)).one_or_none()
    return _assignment(row) if row else None


def reopen(connection: Connection, id: str, author: Author, now: datetime) -> Assignment:
    """Open what was submitted again; until it is submitted anew, what was said stands. Raises ``UnknownAssignment`` and ``NotHeld``."""
    own = get(connection, id, author)
    task = _locked(connection, own.task_id)
    if own.state == "leased":
        return own
    if own.state != "submitted" or own.finished_at is None or own.finished_at <= now - UNDO or task.state == "withdrawn":
        raise NotHeld(f"what was submitted can be changed for {UNDO.seconds // 60} minutes; this cannot be changed any more")
    opened = _lease(connection, own, now)
    _settle(connection, own.task_id)
    return opened


def lapse(connection: Connection, now: datetime) -> int:
    """Give back what nobody showed a sign of life for; returns how much it was. Next assignments are looked for after that."""
    return _end(connection, assignment.c.lease_until <= now)


def progress(connection: Connection, author: Author, since: datetime, now: datetime) -> tuple[int, int]:
    """How many an annotator has submitted since then, and how many wait for them."""
    annotator = annotators.known(connection, author)
    annotator_id = annotator.id if annotator else ""
    done = (assignment.c.annotator_id == annotator_id, assignment.c.state == "submitted", assignment.c.finished_at >= since)
    counts = [select(assignment.c.id).where(*done), _new(annotator_id, now), _left(annotator_id, now)]
    submitted, new, left = (connection.execute(select(func.count()).select_from(each.subquery())).scalar_one() for each in counts)
    return submitted, new + left


def said(connection: Connection, given: Assignment) -> list[Feedback]:
    """All feedback that came of an assignment, in the order in which it was given; its idempotency keys begin with the assignment's id."""
    columns = [feedback.c[name] for name in Feedback.__dataclass_fields__]
    mine = (feedback.c.annotator_id == given.annotator_id, feedback.c.idem_key.startswith(f"{given.id}/"))
    return [Feedback(**row._mapping) for row in connection.execute(select(*columns).where(*mine).order_by(feedback.c.id))]


def _check_task(connection: Connection, group_id: str, overlap: int, gold: Sequence[Sequence[str]] | None) -> None:
    group = get_group(connection, group_id)
    if group is None:
        raise StoreError(f"there is no group {group_id!r}")
    if overlap < 1:
        raise StoreError(f"the overlap is {overlap}; allowed: 1 or more people to a task")
    candidates = {completion_id for completion_id, _ in group.candidates}
    if not 2 <= len(candidates) <= 9:
        raise StoreError(f"group {group_id!r} has {len(candidates)} completions; allowed: 2 to 9")
    if gold is not None and sorted(id for tier in gold for id in tier) != sorted(candidates):
        raise StoreError(f"the gold ranking of group {group_id!r} must name each of its {len(candidates)} completions once")
    if connection.execute(select(_gone(group_id, datetime.now(UTC)))).scalar_one():
        raise StoreError(f"completions of group {group_id!r} are not stored any more, and nobody can read them")


def _gone(group_id: str | ColumnElement[str], now: datetime) -> ColumnElement[bool]:
    """Whether the words of any of a group's completions are erased, or to be."""
    gone = or_(inference.c.redaction == "erased", and_(inference.c.retention_until.is_not(None), inference.c.retention_until <= now))
    of_group = select(1).select_from(cmp_candidate).join(completion).join(inference)
    return exists(of_group.where(cmp_candidate.c.group_id == group_id, gone))


def _taken(task_id: ColumnElement[str]) -> ColumnElement[int]:
    """How many of a task's places are taken."""
    each = assignment.alias("each")
    places = select(func.count()).select_from(each).where(each.c.task_id == task_id, each.c.state.in_(("leased", "submitted")))
    return places.scalar_subquery()


def _has_room(now: datetime) -> list[ColumnElement[bool]]:
    """What makes a task one that can be given to somebody."""
    return [_OPEN, _taken(label_task.c.id) < label_task.c.overlap, ~_gone(label_task.c.group_id, now)]


def _new(annotator_id: str, now: datetime) -> Select[Any]:
    """Tasks that an annotator can be given and never had."""
    had = select(1).where(assignment.c.task_id == label_task.c.id, assignment.c.annotator_id == annotator_id)
    return select(*_TASK).where(*_has_room(now), ~exists(had))


def _first_new(connection: Connection, annotator_id: str, kind: ColumnElement[bool], now: datetime) -> Row[Any] | None:
    found = _new(annotator_id, now).where(kind).order_by(label_task.c.priority.desc(), label_task.c.id)
    return connection.execute(found.limit(1).with_for_update()).one_or_none()


def _left(annotator_id: str, now: datetime) -> Select[Any]:
    """What an annotator let lapse and can be given again."""
    mine = (assignment.c.annotator_id == annotator_id, assignment.c.state == "lapsed")
    return select(*_ASSIGNMENT).join(label_task).where(*mine, *_has_room(now))


def _begun(connection: Connection, annotator_id: str, now: datetime) -> Assignment | None:
    """What an annotator holds, first what they opened again, for they are waiting for it; or else what they left."""
    mine = (assignment.c.annotator_id == annotator_id, assignment.c.state == "leased", ~_gone(label_task.c.group_id, now))
    held = select(*_ASSIGNMENT).join(label_task).where(*mine).order_by(assignment.c.finished_at.is_(None), assignment.c.id)
    left = _left(annotator_id, now).order_by(assignment.c.id).with_for_update(of=label_task)
    row = next((row for found in (held, left) if (row := connection.execute(found.limit(1)).one_or_none())), None)
    return _assignment(row) if row else None


def _held(connection: Connection, id: str, author: Author, now: datetime) -> Assignment:
    """An assignment to go on with: a lapsed one too, as long as nobody has taken the place."""
    own = get(connection, id, author)
    task = _locked(connection, own.task_id)
    if task.state == "withdrawn":
        raise NotHeld("this task was withdrawn; nothing more is stored of it")
    if own.state == "leased":
        return own
    if own.state != "lapsed":
        raise NotHeld(f"this task is {own.state} already")
    if connection.execute(select(_taken(label_task.c.id)).where(label_task.c.id == task.id)).scalar_one() >= task.overlap:
        raise NotHeld(f"this task was left for more than {LEASE.seconds // 60} minutes and has gone to somebody else")
    return own


def _locked(connection: Connection, task_id: str) -> Task:
    return _task(connection.execute(select(*_TASK).where(label_task.c.id == task_id).with_for_update()).one())


def _lease(connection: Connection, own: Assignment, now: datetime) -> Assignment:
    leased = replace(own, state="leased", lease_until=now + LEASE)
    connection.execute(update(assignment).where(assignment.c.id == own.id).values(state="leased", lease_until=leased.lease_until))
    return leased


def _finish(connection: Connection, own: Assignment, now: datetime, **values: Any) -> Assignment:
    finished = replace(own, finished_at=now, **values)
    connection.execute(update(assignment).where(assignment.c.id == own.id).values(finished_at=now, **values))
    _settle(connection, own.task_id)
    return finished


def _end(connection: Connection, which: ColumnElement[bool]) -> int:
    """End leases. One that was open again only to be changed is submitted as before: what was said stands."""
    leases = (_LEASED, which)
    undone = connection.scalars(select(assignment.c.task_id).where(*leases, assignment.c.finished_at.is_not(None))).all()
    state = case((assignment.c.finished_at.is_(None), "lapsed"), else_="submitted")
    count = connection.execute(update(assignment).where(*leases).values(state=state)).rowcount
    for task_id in undone:
        _settle(connection, task_id)
    return count


def _settle(connection: Connection, task_id: str) -> None:
    """A task is done when as many as it needs have submitted it."""
    of_task = select(func.count()).select_from(assignment).where(assignment.c.task_id == task_id, assignment.c.state == "submitted")
    state = case((of_task.scalar_subquery() >= label_task.c.overlap, "done"), else_="open")
    connection.execute(update(label_task).where(label_task.c.id == task_id, label_task.c.state != "withdrawn").values(state=state))


def _task(row: Row[Any]) -> Task:
    values = {column.name: row._mapping[column.name] for column in _TASK}
    return Task(**values | {"gold": None if row.gold is None else tuple(tuple(tier) for tier in row.gold)})


def _assignment(row: Row[Any]) -> Assignment:
    return Assignment(**{**row._mapping, "slots": tuple(row.slots)})
