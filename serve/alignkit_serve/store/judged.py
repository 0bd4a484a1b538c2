"""What may be learnt from, as the rules of ``dataset`` read it. Consent is a condition of every query here, and no option.

Nothing is learnt from an inference without consent to training, from one that was erased or is kept no longer, and from a prompt by which
annotators themselves are tested (``label_task.gold``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, and_, func, or_, select, update

from alignkit_serve.dataset.filters import Filters, Shape, moment
from alignkit_serve.dataset.records import Answer, Asked, Evidence, Judgement
from alignkit_serve.store import audit
from alignkit_serve.store.errors import StoreError
from alignkit_serve.store.tables import (
    annotator,
    cmp_candidate,
    cmp_group,
    completion,
    feedback,
    inference,
    label_task,
    metric,
    policy_version,
)

CONSENT = "inference.consent_train, redaction is not erased, retention_until has not passed, no gold task has the prompt"
"""The condition in words, for manifests."""

_AT_ONCE = 5000


def collect(connection: Connection, filters: Filters, shape: Shape) -> Evidence:
    """All that an export of these filters is made of. Raises ``StoreError`` for a policy that there is not."""
    policies = _policies(connection, filters.policies)
    judgements = tuple(_judgement(row) for row in _streamed(connection, _judgements(filters)))
    usable = [*_allowed(), *_of(policies)]
    if shape != "prompts" or filters.of != "all":
        usable.append(_judged(filters))
    prompts = select(inference.c.id, inference.c.messages, inference.c.prompt_sha256, inference.c.policy_version_id).where(*usable)
    asked: dict[str, Asked] = {}
    messages: dict[str, Any] = {}
    for row in _streamed(connection, prompts):
        # Equal prompts are kept once.
        same = messages.setdefault(row.prompt_sha256, row.messages)
        asked[row.id] = Asked(row.id, same, row.prompt_sha256, row.policy_version_id)
    answers: dict[str, Answer] = {}
    candidates: defaultdict[str, tuple[str, ...]] = defaultdict(tuple)
    texts = select(completion.c.id, completion.c.inference_id, completion.c.text, completion.c.policy_version_id)
    of_usable = texts.where(completion.c.inference_id.in_(select(inference.c.id).where(*_allowed(), _judged(filters))))
    for row in _streamed(connection, of_usable.order_by(completion.c.inference_id, completion.c.idx)):
        candidates[row.inference_id] += (row.id,)
        if row.inference_id in asked and (not policies or row.policy_version_id in policies):
            answers[row.id] = Answer(row.id, row.text, row.policy_version_id, asked[row.inference_id])
    for group_id, completion_id in connection.execute(_pooled(filters)):
        candidates[group_id] += (completion_id,)
    return Evidence(judgements, asked, answers, dict(candidates))


def without_consent(connection: Connection, filters: Filters) -> int:
    """How much active feedback is of inferences that may not be trained on."""
    refused = select(func.count()).select_from(feedback.join(inference, feedback.c.inference_id == inference.c.id))
    return connection.scalar(refused.where(*_wanted(filters), inference.c.consent_train.is_(False))) or 0


def quarantine(connection: Connection, reasons: Mapping[str, str], actor: str) -> int:
    """Keep active feedback out of all exports to come, each with why; nothing is deleted. Returns how many it was."""
    count = 0
    for id, reason in sorted(reasons.items()):
        active = (feedback.c.id == id, feedback.c.state == "active")
        if connection.execute(update(feedback).where(*active).values(state="quarantined", reason=reason)).rowcount:
            audit.record(connection, actor, "feedback.quarantine", id, {"reason": reason})
            count += 1
    return count


def release(connection: Connection, ids: Sequence[str], actor: str) -> int:
    """Take feedback out of quarantine again. Returns how many it was."""
    count = 0
    for id in sorted(set(ids)):
        kept = (feedback.c.id == id, feedback.c.state == "quarantined")
        if connection.execute(update(feedback).where(*kept).values(state="active", reason=None)).rowcount:
            audit.record(connection, actor, "feedback.release", id, {})
            count += 1
    return count


def _allowed() -> list[ColumnElement[bool]]:
    gold = select(cmp_group.c.prompt_sha256).join(label_task, label_task.c.group_id == cmp_group.c.id).where(label_task.c.gold.is_not(None))
    return [
        inference.c.consent_train.is_(True),
        inference.c.redaction != "erased",
        or_(inference.c.retention_until.is_(None), inference.c.retention_until > datetime.now(UTC)),
        inference.c.prompt_sha256.not_in(gold),
    ]


def _wanted(filters: Filters) -> list[ColumnElement[bool]]:
    since, until = moment("since", filters.since), moment("until", filters.until)
    conditions: list[ColumnElement[bool]] = [feedback.c.state == "active", feedback.c.kind != "comment"]
    if since:
        conditions.append(feedback.c.received_at >= since)
    if until:
        conditions.append(feedback.c.received_at < until)
    return conditions


def _judgements(filters: Filters) -> Select[Any]:
    """A group of no single inference is judged whether or not all of its answers may be used; those that may not are not there."""
    said = ("id", "kind", "target_type", "target_id", "annotator_id", "api_key_id", "value", "occurred_at", "inference_id", "presentation")
    return (
        select(
            *(feedback.c[name] for name in said),
            annotator.c.weight,
            annotator.c.status,
            metric.c.type.label("metric"),
            metric.c.optimize.label("better"),
        )
        .join(annotator, feedback.c.annotator_id == annotator.c.id)
        .outerjoin(metric, feedback.c.metric_id == metric.c.id)
        .outerjoin(inference, feedback.c.inference_id == inference.c.id)
        .where(*_wanted(filters), or_(feedback.c.inference_id.is_(None), and_(*_allowed())))
        .order_by(feedback.c.id)
    )


def _judged(filters: Filters) -> ColumnElement[bool]:
    """Whether something was said of an inference, or of an answer of it in a group that is of no single one."""
    alone = select(feedback.c.inference_id).where(*_wanted(filters), feedback.c.inference_id.is_not(None))
    pooled = select(completion.c.inference_id).where(completion.c.id.in_(select(_pooled(filters).subquery().c.completion_id)))
    return or_(inference.c.id.in_(alone), inference.c.id.in_(pooled))


def _pooled(filters: Filters) -> Select[Any]:
    """The candidates of groups that are of no single inference, and of which something was said."""
    groups = select(feedback.c.target_id).where(*_wanted(filters), feedback.c.inference_id.is_(None), feedback.c.target_type == "group")
    found = select(cmp_candidate.c.group_id, cmp_candidate.c.completion_id)
    return found.where(cmp_candidate.c.group_id.in_(groups)).order_by(cmp_candidate.c.group_id, cmp_candidate.c.slot)


def _of(policies: Sequence[str]) -> list[ColumnElement[bool]]:
    answered = select(completion.c.inference_id).where(completion.c.policy_version_id.in_(policies))
    return [inference.c.id.in_(answered)] if policies else []


def _policies(connection: Connection, named: Sequence[str]) -> list[str]:
    """The ids of policies that are named by name or by id."""
    known = {row.name: row.id for row in connection.execute(select(policy_version.c.name, policy_version.c.id))}
    unknown = [name for name in named if name not in known and name not in known.values()]
    if unknown:
        raise StoreError(f"there is no policy {unknown[0]!r}; registered are: {', '.join(sorted(known)) or 'none'}")
    return [known.get(name, name) for name in named]


def _judgement(row: Row[Any]) -> Judgement:
    said = dict(row._mapping)
    shown = said.pop("presentation") or {}
    return Judgement(**said, dwell_ms=shown.get("dwell_ms"))


def _streamed(connection: Connection, query: Select[Any]) -> Iterator[Row[Any]]:
    yield from connection.execute(query.execution_options(yield_per=_AT_ONCE))
