"""Erasing what people said: their texts, what others made of those, and the trust in exports that hold any of it.

Ids and reasons stay, so that what was trained on it can still be told.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import Connection, Select, and_, func, insert, or_, select, union_all, update

from alignkit_serve.store import audit, inferences, labels
from alignkit_serve.store.annotators import END_USERS, end_user
from alignkit_serve.store.errors import StoreError
from alignkit_serve.store.ids import new_id
from alignkit_serve.store.lineage import Reach, reach
from alignkit_serve.store.secrets import secret
from alignkit_serve.store.tables import (
    annotator,
    assignment,
    cmp_candidate,
    cmp_group,
    completion,
    erasure,
    export,
    export_row,
    feedback,
    inference,
    label_task,
)

_ANNOTATOR = re.compile("ann-[0-9a-f]{32}")
_TEXTS = ("correction", "demonstration", "comment")
_AT_ONCE = 500

OWN = "erased with whoever said it"
ABOUT = "erased with what it is about"
"""Why feedback is in the state ``erased``."""


class UnknownSubject(StoreError):
    """An annotator id that is nobody's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Erasure:
    """What one request to erase came to. ``counts``: what was erased now; ``reach``: where it, and what was erased before, had gone."""

    id: str
    requested_at: datetime
    done_at: datetime
    counts: Mapping[str, int]
    reach: Reach


@dataclass(frozen=True, slots=True)
class _Subject:
    hmac: str
    annotator_id: str | None


def erase(connection: Connection, name: str, actor: str) -> Erasure:
    """Erase what an end user asked, was answered and judged, by the name that their application has for them, or by an annotator's id.

    Again it erases what came since, and tells of all. An answer in progress is not erased, but counted as ``running``: ask once more.
    Raises ``UnknownSubject``.
    """
    begun = datetime.now(UTC)
    subject = _subject(connection, name)
    theirs = (inference.c.end_user_hmac == subject.hmac, inference.c.redaction != "erased")
    running = connection.execute(select(func.count()).where(*theirs, inference.c.status == "running")).scalar_one()
    asked = list(connection.scalars(select(inference.c.id).where(*theirs, inference.c.status != "running").order_by(inference.c.id)))
    said = select(feedback.c.first_id).where(feedback.c.annotator_id == subject.annotator_id, feedback.c.state != "erased").distinct()
    own, made = _silenced(connection, list(connection.scalars(said)), OWN), _prompts_of(connection, asked)
    if subject.annotator_id is not None:
        nothing = {"draft": None, "reason": None}
        connection.execute(update(assignment).where(assignment.c.annotator_id == subject.annotator_id).values(nothing))
    counts = {"inferences": len(asked), "completions": 0, "running": running, "feedback": len(own), "tasks": 0, "exports": 0}
    for ids in _chunks(asked):
        about, tasks = _forget_about(connection, ids)
        own |= about
        counts["feedback"] += len(about)
        counts["tasks"] += tasks
        counts["completions"] += inferences.erase(connection, ids)
    exports = made | _exports_of(connection, own)
    counts["exports"] = _taint(connection, exports, begun)
    earlier = connection.scalars(select(erasure.c.rounds).where(erasure.c.subject_hmac == subject.hmac))
    reached = reach(connection, exports | {id for each in earlier for id in each["exports"]})
    done = Erasure(id=new_id("era-"), requested_at=begun, done_at=datetime.now(UTC), counts=counts, reach=reached)
    known = {
        "exports": [each.id for each in reached.exports],
        "rounds": [each.id for each in reached.rounds],
        "policies": [each.id for each in reached.policies],
    }
    times = {"requested_at": done.requested_at, "done_at": done.done_at}
    connection.execute(insert(erasure).values(id=done.id, subject_hmac=subject.hmac, counts=counts, rounds=known, **times))
    audit.record(connection, actor, "erasure", done.id, {"counts": counts, **known})
    return done


def delete_inference(connection: Connection, id: str, actor: str, *, api_key_id: str | None = None) -> bool:
    """Erase one inference, as ``inferences.delete`` does, and with it what was said of it; exports with any of that are tainted."""
    if not inferences.delete(connection, id, api_key_id=api_key_id):
        return False
    about, _ = _forget_about(connection, [id])
    exports = _exports_of(connection, about) | _prompts_of(connection, [id])
    if _taint(connection, exports, datetime.now(UTC)):
        audit.record(connection, actor, "export.taint", id, {"exports": sorted(exports)})
    return True


def _subject(connection: Connection, name: str) -> _Subject:
    who = select(annotator.c.id, annotator.c.subject_hmac)
    if _ANNOTATOR.fullmatch(name):
        row = connection.execute(who.where(annotator.c.id == name)).one_or_none()
        if row is None:
            raise UnknownSubject(f"there is no annotator {name!r}")
        return _Subject(row.subject_hmac, row.id)
    hashed = end_user(secret(connection, END_USERS), name)
    row = connection.execute(who.where(annotator.c.subject_hmac == hashed)).one_or_none()
    return _Subject(hashed, row.id if row else None)


def _forget_about(connection: Connection, ids: Sequence[str]) -> tuple[set[str], int]:
    """Silence what was said of inferences, of their answers and of groups with one of them; which that was, and how many tasks went too."""
    answers = select(completion.c.id).where(completion.c.inference_id.in_(ids))
    groups = select(cmp_candidate.c.group_id).where(cmp_candidate.c.completion_id.in_(answers)).distinct()
    targets = union_all(select(inference.c.id).where(inference.c.id.in_(ids)), answers, groups)
    about = select(feedback.c.first_id).where(feedback.c.target_id.in_(targets)).distinct()
    # Of an episode, which may have had other people in it, it is the words that may tell what was said.
    words = or_(feedback.c.kind.in_(_TEXTS), feedback.c.rationale.is_not(None))
    episodes = select(inference.c.episode_id).where(inference.c.id.in_(ids), inference.c.episode_id.is_not(None)).distinct()
    of_episodes = select(feedback.c.first_id).where(feedback.c.target_id.in_(episodes), feedback.c.target_type == "episode", words)
    firsts = {*connection.scalars(about), *connection.scalars(of_episodes)}
    connection.execute(update(cmp_group).where(cmp_group.c.id.in_(groups)).values(prompt_sha256=""))
    tasks = list(connection.scalars(select(label_task.c.id).where(label_task.c.group_id.in_(groups), label_task.c.state != "withdrawn")))
    for task in tasks:
        labels.withdraw(connection, task)
        connection.execute(update(assignment).where(assignment.c.task_id == task).values(draft=None))
    return _silenced(connection, list(firsts), ABOUT), len(tasks)


def _silenced(connection: Connection, firsts: Sequence[str], reason: str) -> set[str]:
    """Erase opinions with all that they superseded and that superseded them; the ids of those that were not erased before.

    The idempotency key stays: what is sent again, late, is known and does not come back.
    """
    found: set[str] = set()
    nothing = {"rationale": None, "presentation": None, "body_sha256": "", "state": "erased", "reason": reason}
    for chunk in _chunks(firsts):
        mine = and_(feedback.c.first_id.in_(chunk), feedback.c.state != "erased")
        found |= set(connection.scalars(select(feedback.c.id).where(mine)))
        connection.execute(update(feedback).where(mine, feedback.c.kind.in_(_TEXTS)).values(value="", **nothing))
        connection.execute(update(feedback).where(mine).values(nothing))
    return found


def _exports_of(connection: Connection, feedback_ids: Collection[str]) -> set[str]:
    used = select(export_row.c.export_id).distinct()
    return {id for ids in _chunks(list(feedback_ids)) for id in connection.scalars(used.where(export_row.c.feedback_id.in_(ids)))}


def _prompts_of(connection: Connection, ids: Sequence[str]) -> set[str]:
    """Exports that may hold the prompts of inferences though nothing was said of them: of all prompts that there were when they were made.

    Which ones they really hold is written in their files alone, so that each made since the first of the inferences counts.
    """
    since = [moment for chunk in _chunks(ids) if (moment := connection.execute(_earliest(chunk)).scalar_one())]
    if not since:
        return set()
    later = select(export.c.id, export.c.filters).where(export.c.shape == "prompts", export.c.created_at >= min(since))
    return {row.id for row in connection.execute(later) if row.filters.get("of") == "all"}


def _earliest(ids: Sequence[str]) -> Select[tuple[datetime]]:
    return select(func.min(inference.c.created_at)).where(inference.c.id.in_(ids), inference.c.consent_train)


def _taint(connection: Connection, ids: Collection[str], at: datetime) -> int:
    """Note of exports that they hold what was erased; returns for how many it is new."""
    return connection.execute(update(export).where(export.c.id.in_(ids), export.c.tainted_at.is_(None)).values(tainted_at=at)).rowcount


def _chunks(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """So many that a statement takes them."""
    return (ids[at : at + _AT_ONCE] for at in range(0, len(ids), _AT_ONCE))
