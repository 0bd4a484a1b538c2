"""Where label tasks come from: completions that are compared on purpose, texts from elsewhere, and what traffic left to be compared.

Whatever is asked for twice is there once: a group's id follows from what it compares.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Select, and_, case, func, or_, select
from sqlalchemy.sql import ColumnElement

from alignkit_serve.store import groups, inferences, labels, policies
from alignkit_serve.store.feedback import Refused
from alignkit_serve.store.groups import Group, Origin
from alignkit_serve.store.ids import new_id
from alignkit_serve.store.inferences import Completion, Inference, prompt_sha256
from alignkit_serve.store.labels import Task
from alignkit_serve.store.policies import PolicyVersion
from alignkit_serve.store.tables import assignment, cmp_candidate, cmp_group, completion, inference, label_task
from alignkit_serve.store.values import json_text, plain

IMPORTED = "imported"
"""The policy version that texts from elsewhere are stored under; it answers nothing."""

_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a task is to be like. ``gold``: tiers of completion ids, or of their places in the group from 0."""

    overlap: int
    priority: int = 0
    gold: Sequence[Sequence[str | int]] | None = None


@dataclass(frozen=True, slots=True)
class Pooled:
    """A task with what it compares, and its assignments by state. ``tag``: the name under which its maker finds it again."""

    task: Task
    assignments: Mapping[str, int]
    prompt_sha256: str
    origin: Origin
    completion_ids: tuple[str, ...]
    tag: str | None


def of_completions(
    connection: Connection, completion_ids: Sequence[str], wanted: Wanted, *, tag: str | None = None
) -> tuple[Task, bool] | Refused:
    """The task that compares these completions, and whether it is new. Under a ``tag`` there is one, whatever is named the second time.

    Raises ``StoreError`` where there is a task that wants something else.
    """
    id = _derived("grp-", ["tag", tag] if tag is not None else ["completions", *sorted(completion_ids)])
    if groups.get_group(connection, id) is None:
        asked = {row.id: row for row in connection.execute(_asked(completion_ids))}
        if missing := [one for one in completion_ids if one not in asked]:
            return Refused("not_found", f"there is no completion {missing[0]!r}", "completion_ids")
        if gone := [one for one in completion_ids if asked[one].gone]:
            return Refused("not_stored", f"the completion {gone[0]!r} is not stored any more; nobody can judge it", "completion_ids")
        prompts = {row.prompt_sha256 for row in asked.values()}
        if len(prompts) > 1:
            return Refused("invalid_value", "the completions answer different prompts; compared are answers to one", "completion_ids")
        presentation = None if tag is None else {"tag": tag}
        candidates = tuple((one, slot) for slot, one in enumerate(completion_ids))
        groups.add_group(connection, Group(id, prompts.pop(), "label_pool", presentation, None, candidates))
    return of_group(connection, id, wanted)


def of_group(connection: Connection, group_id: str, wanted: Wanted) -> tuple[Task, bool] | Refused:
    """The task of a group, and whether it is new. Raises ``StoreError`` where there is one that wants something else."""
    group = groups.get_group(connection, group_id)
    if group is None:
        return Refused("not_found", f"there is no group {group_id!r}", "group_id")
    gold = None
    if wanted.gold is not None:
        ids = [completion_id for completion_id, _ in group.candidates]
        gold = [[ids[one] if isinstance(one, int) and 0 <= one < len(ids) else str(one) for one in tier] for tier in wanted.gold]
        if sorted(one for tier in gold for one in tier) != sorted(ids):
            message = f"gold ranks each of the {len(ids)} completions once, by its id or by its place from 0 to {len(ids) - 1}"
            return Refused("invalid_value", message, "gold")
    new = connection.execute(select(label_task.c.id).where(label_task.c.group_id == group_id)).one_or_none() is None
    return labels.add_task(connection, group_id, overlap=wanted.overlap, priority=wanted.priority, gold=gold), new


def of_texts(
    connection: Connection,
    messages: Sequence[Mapping[str, str]],
    responses: Sequence[str],
    wanted: Wanted,
    *,
    request_id: str,
    api_key_id: str | None,
) -> tuple[Task, bool] | Refused:
    """The task that compares texts from elsewhere, which are stored, and whether it is new. Raises as ``of_completions`` does."""
    content = plain([list(messages), list(responses)])
    group_id = _derived("grp-", content)
    if groups.get_group(connection, group_id) is None:
        version, now = _imported(connection), datetime.now(UTC)
        asked = Inference(
            id=_derived("imp-", content),
            endpoint="import",
            model=IMPORTED,
            request_id=request_id,
            api_key_id=api_key_id,
            messages=[dict(message) for message in messages],
            prompt_sha256=prompt_sha256(messages),
            params={},
            metadata={},
            seed=0,
            policy_version_id=version.id,
            engine="import",
            consent_train=True,
            created_at=now,
        )
        answers = [_foreign(asked, i, text) for i, text in enumerate(responses)]
        inferences.begin(connection, asked)
        inferences.finish(connection, asked.id, answers, status="done", prompt_tokens=0, completion_tokens=0)
        candidates = tuple((answer.id, answer.idx) for answer in answers)
        groups.add_group(connection, Group(group_id, asked.prompt_sha256, "import", None, asked.id, candidates))
    return of_group(connection, group_id, wanted)


def collect(connection: Connection, origins: Sequence[Origin], wanted: Wanted, *, limit: int) -> list[Task]:
    """Make tasks of groups of traffic that have none: the oldest first, of different answers, all stored, and given for training."""
    usable = and_(inference.c.consent_train, inference.c.status == "done", ~_gone(datetime.now(UTC)))
    found = (
        select(cmp_group.c.id)
        .join(cmp_candidate)
        .join(completion)
        .join(inference, inference.c.id == completion.c.inference_id)
        .outerjoin(label_task, label_task.c.group_id == cmp_group.c.id)
        .where(cmp_group.c.origin.in_(origins), label_task.c.id.is_(None))
        .group_by(cmp_group.c.id)
        .having(func.count().between(2, 9), func.count(completion.c.text.distinct()) > 1, func.min(case((usable, 1), else_=0)) == 1)
        .order_by(cmp_group.c.id)
        .limit(limit)
    )
    ids = connection.scalars(found).all()
    return [labels.add_task(connection, id, overlap=wanted.overlap, priority=wanted.priority) for id in ids]


def pooled(connection: Connection, tasks: Sequence[Task]) -> list[Pooled]:
    """Tasks with what they compare and how far they are, in their order."""
    ids = [task.group_id for task in tasks]
    about = {row.id: row for row in connection.execute(select(cmp_group).where(cmp_group.c.id.in_(ids)))}
    compared: dict[str, list[str]] = {id: [] for id in ids}
    of_groups = select(cmp_candidate.c.group_id, cmp_candidate.c.completion_id).where(cmp_candidate.c.group_id.in_(ids))
    for group_id, completion_id in connection.execute(of_groups.order_by(cmp_candidate.c.slot)):
        compared[group_id].append(completion_id)
    counts: dict[str, dict[str, int]] = {task.id: {} for task in tasks}
    states = select(assignment.c.task_id, assignment.c.state, func.count()).where(assignment.c.task_id.in_(counts))
    for task_id, state, count in connection.execute(states.group_by(assignment.c.task_id, assignment.c.state)):
        counts[task_id][state] = count
    return [
        Pooled(
            task,
            counts[task.id],
            prompt_sha256=about[task.group_id].prompt_sha256,
            origin=about[task.group_id].origin,
            completion_ids=tuple(compared[task.group_id]),
            tag=(about[task.group_id].presentation or {}).get("tag"),
        )
        for task in tasks
    ]


def every(connection: Connection) -> Iterator[Pooled]:
    """All tasks, the oldest first."""
    last, more = None, True
    while more:
        rows, more = labels.tasks(connection, after=last, limit=_AT_ONCE)
        yield from pooled(connection, [row.task for row in rows])
        last = rows[-1].task.id if rows else None


def tagged(connection: Connection, tag: str) -> Task | None:
    """The task that was made under a tag."""
    id = connection.execute(select(label_task.c.id).where(label_task.c.group_id == _derived("grp-", ["tag", tag]))).scalar_one_or_none()
    return labels.get_task(connection, id) if id is not None else None


def _asked(completion_ids: Sequence[str]) -> Select[Any]:
    gone = case((_gone(datetime.now(UTC)), 1), else_=0).label("gone")
    return select(completion.c.id, inference.c.prompt_sha256, gone).join(inference).where(completion.c.id.in_(completion_ids))


def _gone(now: datetime) -> ColumnElement[bool]:
    expired = and_(inference.c.retention_until.is_not(None), inference.c.retention_until <= now)
    return or_(inference.c.redaction == "erased", expired)


def _derived(prefix: str, what: object) -> str:
    return prefix + hashlib.sha256(json_text(what).encode()).hexdigest()[:32]


def _foreign(asked: Inference, idx: int, text: str) -> Completion:
    return Completion(
        id=new_id("cmp-"),
        inference_id=asked.id,
        idx=idx,
        text=text,
        token_ids=(),
        raw_logprobs=None,
        behaviour_logprobs=None,
        finish_reason="stop",
        policy_version_id=asked.policy_version_id,
    )


def _imported(connection: Connection) -> PolicyVersion:
    known = policies.by_name(connection, IMPORTED)
    if known is None:
        known = PolicyVersion(
            id=_derived("pol-", [IMPORTED]), name=IMPORTED, base_model="", path="", template_sha256="", created_at=datetime.now(UTC)
        )
        policies.register(connection, known)
        policies.move(connection, known.id, "retired")
    return known
