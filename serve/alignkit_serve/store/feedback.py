"""What was said of answers. Nothing is changed or removed: a new opinion supersedes the old one, and a retracted one stays, as retracted.

Many are added at once: each is looked at on its own, and what they refer to is looked up for all of them together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import BindParameter, Connection, Row, Text, bindparam, insert, select, update
from sqlalchemy.sql import ColumnElement

from alignkit_serve.store import annotators, metrics
from alignkit_serve.store.annotators import Author
from alignkit_serve.store.ids import new_id
from alignkit_serve.store.tables import Words, cmp_candidate, cmp_group, completion, feedback, fields_of, inference, rank_entry
from alignkit_serve.store.values import clean, json_text, plain

Kind = Literal["thumb", "rating", "metric", "preference", "ranking", "correction", "demonstration", "comment", "flag"]
TargetType = Literal["completion", "inference", "episode", "group"]
State = Literal["active", "superseded", "retracted", "quarantined", "erased"]
Code = Literal["not_found", "not_stored", "invalid_value", "idempotency_conflict", "superseded", "annotator_blocked"]

UNSTORED = "unstored-"
"""What the id of an answer that is not stored has after its prefix, so that whoever is told it can be told why it means nothing here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Feedback:
    """One opinion as it is stored. ``first_id``: the oldest of those of which each supersedes the one before."""

    id: str
    first_id: str
    supersedes_id: str | None
    kind: Kind
    target_type: TargetType
    target_id: str
    inference_id: str | None
    metric_id: str | None
    annotator_id: str
    api_key_id: str | None
    value: Any
    rationale: str | None
    presentation: Mapping[str, Any] | None
    source: Literal["api", "page", "import", "judge"]
    idem_key: str
    body_sha256: str
    occurred_at: datetime
    received_at: datetime
    state: State = "active"
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Opinion:
    """What somebody says. ``idem_key``: theirs, by which it is known again. ``within``: the one inference that they may speak of."""

    author: Author
    within: str | None = None
    idem_key: str | None = None
    kind: Kind
    target_type: TargetType
    target_id: str
    value: Any
    metric: tuple[str, int | None] | None = None
    rationale: str | None = None
    presentation: Mapping[str, Any] | None = None
    source: Literal["api", "page", "import", "judge"] = "api"
    occurred_at: datetime | None = None

    def candidates(self) -> tuple[str, ...]:
        """The completions that it compares."""
        if self.kind == "preference":
            return self.value["a"], self.value["b"]
        if self.kind == "ranking":
            return tuple(id for tier in self.value for id in tier)
        return ()

    def storable(self) -> Opinion:
        """As it comes back from the store, so that it is compared with what is there."""
        return replace(
            self,
            idem_key=None if self.idem_key is None else clean(self.idem_key),
            target_id=clean(self.target_id),
            value=plain(self.value),
            rationale=None if self.rationale is None else clean(self.rationale),
            presentation=plain(self.presentation),
            occurred_at=self.occurred_at and self.occurred_at.astimezone(UTC),
        )

    def sha256(self, revises: str | None = None) -> str:
        """The hash by which an opinion that is ``storable`` is told from another under the same key."""
        said = [self.kind, self.target_type, self.target_id, self.value, self.metric, self.rationale, self.presentation, self.source]
        at = self.occurred_at and self.occurred_at.isoformat()
        return hashlib.sha256(json_text([*said, at, revises]).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Accepted:
    """``new`` is False for what was there already, under the same key."""

    feedback: Feedback
    new: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """Why an opinion is not stored. ``param``: the field at fault."""

    code: Code
    message: str
    param: str | None = None


Outcome = Accepted | Refused

_COLUMNS = [feedback.c[name] for name in Feedback.__dataclass_fields__]


def add(connection: Connection, opinions: Sequence[Opinion]) -> list[Outcome]:
    """Store the opinions that can be; what became of each, in their order."""
    opinions = [opinion.storable() for opinion in opinions]
    authors = {author: annotators.of(connection, author) for author in {opinion.author for opinion in opinions}}
    known = _under(connection, {(authors[one.author].id, one.idem_key) for one in opinions if one.idem_key is not None})
    answers = _Answers.of(connection, opinions)
    outcomes: list[Outcome] = []
    rows: list[Feedback] = []
    for opinion in opinions:
        annotator = authors[opinion.author]
        if annotator.status == "blocked":
            outcomes.append(Refused("annotator_blocked", "feedback of this author is not taken any more"))
            continue
        digest = opinion.sha256()
        if opinion.idem_key is not None and (before := known.get((annotator.id, opinion.idem_key))):
            outcomes.append(_repeated(before, digest))
            continue
        found = answers.judged(connection, opinion)
        if isinstance(found, Refused):
            outcomes.append(found)
            continue
        row = _row(opinion, digest, annotator.id, *found)
        known[annotator.id, row.idem_key] = row
        rows.append(row)
        outcomes.append(Accepted(row, True))
    _insert(connection, rows)
    return outcomes


def revise(connection: Connection, id: str, opinion: Opinion, *, every: bool = False) -> Outcome:
    """Let an opinion take the place of the one with that ``id``, whose target it is about. ``every``: of whomever that is."""
    annotator = annotators.of(connection, opinion.author)
    old = get(connection, id, opinion.author, opinion.within, every=every)
    if old is None:
        return unknown(id)
    if annotator.status == "blocked":
        return Refused("annotator_blocked", "feedback of this author is not taken any more")
    opinion = replace(opinion, target_type=old.target_type, target_id=old.target_id).storable()
    digest = opinion.sha256(id)
    if opinion.idem_key is not None and (before := _under(connection, {(annotator.id, opinion.idem_key)})):
        return _repeated(next(iter(before.values())), digest)
    if opinion.kind != old.kind:
        return Refused("invalid_value", f"feedback {id!r} is a {old.kind} and stays one; retract it, and say the other thing anew", "kind")
    if old.state != "active":
        return _not_active(connection, old)
    found = _Answers.of(connection, [opinion]).judged(connection, opinion, old.metric_id)
    if isinstance(found, Refused):
        return found
    row = replace(_row(opinion, digest, annotator.id, *found), first_id=old.first_id, supersedes_id=old.id)
    connection.execute(update(feedback).where(feedback.c.id == old.id).values(state="superseded"))
    _insert(connection, [row])
    return Accepted(row, True)


def retract(connection: Connection, id: str, author: Author, within: str | None = None, *, every: bool = False) -> Feedback | Refused:
    """Take an opinion back; it is kept, as retracted. Retracting twice is retracting once."""
    old = get(connection, id, author, within, every=every)
    if old is None:
        return unknown(id)
    if old.state == "retracted":
        return old
    if old.state != "active":
        return _not_active(connection, old)
    connection.execute(update(feedback).where(feedback.c.id == id).values(state="retracted"))
    return replace(old, state="retracted")


def get(connection: Connection, id: str, author: Author, within: str | None = None, *, every: bool = False) -> Feedback | None:
    """By id, if it is the author's own, or ``every`` one may be seen; and of the one inference ``within``, if there is one."""
    visible = _visible(connection, author, within, every=every)
    if visible is None:
        return None
    row = connection.execute(select(*_COLUMNS).where(feedback.c.id == id, *visible)).one_or_none()
    return Feedback(**row._mapping) if row else None


def history(connection: Connection, first_id: str) -> list[Feedback]:
    """All that superseded one another, the oldest first."""
    rows = connection.execute(select(*_COLUMNS).where(feedback.c.first_id == first_id)).all()
    after = {row.supersedes_id: Feedback(**row._mapping) for row in rows}
    chain = []
    at = after.get(None)
    while at is not None:
        chain.append(at)
        at = after.get(at.id)
    return chain


def listed(
    connection: Connection,
    author: Author,
    *,
    within: str | None = None,
    every: bool = False,
    target: str | None = None,
    kind: str | None = None,
    state: str | None = None,
    after: str | None = None,
    limit: int = 20,
    order: Literal["asc", "desc"] = "asc",
) -> tuple[list[Feedback], bool]:
    """What ``get`` would find, ``limit`` of it in the order of the ids, and whether there is more."""
    visible = _visible(connection, author, within, every=every)
    if visible is None:
        return [], False
    wanted = [(feedback.c.target_id, target), (feedback.c.kind, kind), (feedback.c.state, state)]
    conditions = [*visible, *(column == value for column, value in wanted if value is not None)]
    id = feedback.c.id
    if after is not None:
        conditions.append(id > after if order == "asc" else id < after)
    found = select(*_COLUMNS).where(*conditions).order_by(id if order == "asc" else id.desc()).limit(limit + 1)
    rows = connection.execute(found).all()
    return [Feedback(**row._mapping) for row in rows[:limit]], len(rows) > limit


@dataclass(frozen=True, slots=True)
class _Answers:
    """What opinions are about, as far as it is stored: for each id the inference that it belongs to, and whether its words are gone."""

    found: Mapping[tuple[str, str], tuple[str | None, bool]]
    candidates: Mapping[tuple[str, str], frozenset[str]]
    texts: Mapping[str, str]
    named: dict[tuple[str, int | None], metrics.Metric | None] = field(default_factory=dict)

    @classmethod
    def of(cls, connection: Connection, opinions: Sequence[Opinion]) -> _Answers:
        """For all of the opinions at once."""
        wanted: dict[str, set[str]] = {"completion": set(), "inference": set(), "episode": set(), "group": set()}
        compared: dict[str, set[str]] = {"inference": set(), "group": set()}
        for opinion in opinions:
            wanted[opinion.target_type].add(opinion.target_id)
            if opinion.candidates():
                compared[opinion.target_type].add(opinion.target_id)
        corrected = {opinion.target_id for opinion in opinions if opinion.kind == "correction"}
        return cls(found=_targets(connection, wanted), candidates=_compared(connection, compared), texts=_texts(connection, corrected))

    def judged(self, connection: Connection, opinion: Opinion, metric_id: str | None = None) -> tuple[str | None, str | None] | Refused:
        """The inference and the metric that an opinion is about, if it can be stored. ``metric_id``: which metric it was about before."""
        what, id = opinion.target_type, opinion.target_id
        if id.partition("-")[2].startswith(UNSTORED):
            return Refused("not_stored", f"the {what} {id!r} was not stored, as its request wished; nothing can be said of it", "target_id")
        target = self.found.get((what, id))
        if target is None or opinion.within not in (None, target[0]):
            return Refused("not_found", f"there is no {what} {id!r}", "target_id")
        inference_id, gone = target
        if gone:
            return Refused("not_stored", f"the {what} {id!r} is not stored any more; nothing can be said of it", "target_id")
        strangers = [each for each in opinion.candidates() if each not in self.candidates.get((what, id), ())]
        if strangers:
            message = f"{strangers[0]!r} is no completion of the {what} {id!r}; compared are completions of one {what}"
            return Refused("invalid_value", message, "value")
        if opinion.kind == "correction" and opinion.value.strip() == self.texts[id].strip():
            return Refused("invalid_value", "the correction is the same as the answer; a thumb says that it is right", "value")
        if opinion.kind != "metric":
            return inference_id, None
        found = metrics.by_id(connection, metric_id) if metric_id else self._metric(connection, opinion)
        if isinstance(found, Refused):
            return found
        problem = found.problem(opinion.value)
        return Refused("invalid_value", problem, "value") if problem else (inference_id, found.id)

    def _metric(self, connection: Connection, opinion: Opinion) -> metrics.Metric | Refused:
        assert opinion.metric
        name, version = opinion.metric
        if opinion.metric not in self.named:
            self.named[opinion.metric] = metrics.get(connection, name, version)
        found = self.named[opinion.metric]
        if found is None:
            which = name if version is None else f"{name} in version {version}"
            return Refused("not_found", f"there is no metric {which!r}; an admin defines one", "metric")
        if found.level != opinion.target_type:
            message = f"the metric {name!r} is of a {found.level}, and the target is a {opinion.target_type}"
            return Refused("invalid_value", message, "target_type")
        return found


# Statements that every piece of feedback needs are made once: SQLAlchemy takes longer to put one together than SQLite does to answer it.
_IDS: BindParameter[Any] = bindparam("ids", expanding=True)
_KEPT = (inference.c.redaction, inference.c.retention_until)
_TARGETS = {
    "completion": select(completion.c.id, completion.c.inference_id, *_KEPT).join(inference).where(completion.c.id.in_(_IDS)),
    "inference": select(inference.c.id, inference.c.id.label("inference_id"), *_KEPT).where(inference.c.id.in_(_IDS)),
    "group": select(cmp_group.c.id, cmp_group.c.inference_id, *_KEPT).outerjoin(inference).where(cmp_group.c.id.in_(_IDS)),
}
_EPISODES = select(inference.c.episode_id).where(inference.c.episode_id.in_(_IDS)).distinct()


def _targets(connection: Connection, wanted: Mapping[str, set[str]]) -> dict[tuple[str, str], tuple[str | None, bool]]:
    now = datetime.now(UTC)
    found: dict[tuple[str, str], tuple[str | None, bool]] = {}
    for what, query in _TARGETS.items():
        if wanted[what]:
            for id, inference_id, redaction, until in connection.execute(query, {"ids": list(wanted[what])}):
                found[what, id] = (inference_id, redaction == "erased" or (until is not None and until <= now))
    if wanted["episode"]:
        found.update({("episode", id): (None, False) for id in connection.scalars(_EPISODES, {"ids": list(wanted["episode"])})})
    return found


_COMPARED = {
    "group": select(cmp_candidate.c.group_id, cmp_candidate.c.completion_id).where(cmp_candidate.c.group_id.in_(_IDS)),
    "inference": select(completion.c.inference_id, completion.c.id).where(completion.c.inference_id.in_(_IDS)),
}


def _compared(connection: Connection, wanted: Mapping[str, set[str]]) -> dict[tuple[str, str], frozenset[str]]:
    found: dict[tuple[str, str], set[str]] = {}
    for what, query in _COMPARED.items():
        if wanted[what]:
            for id, candidate in connection.execute(query, {"ids": list(wanted[what])}):
                found.setdefault((what, id), set()).add(candidate)
    return {key: frozenset(ids) for key, ids in found.items()}


def _texts(connection: Connection, ids: Iterable[str]) -> dict[str, str]:
    wanted = list(ids)
    if not wanted:
        return {}
    return {id: text for id, text in connection.execute(select(completion.c.id, completion.c.text).where(completion.c.id.in_(wanted)))}


# For pairs in one list SQLite would read the whole table.
_UNDER = select(*_COLUMNS).where(
    feedback.c.annotator_id == bindparam("annotator_id"), feedback.c.idem_key.in_(bindparam("idem_keys", expanding=True))
)


def _under(connection: Connection, keys: set[tuple[str, str]]) -> dict[tuple[str, str], Feedback]:
    """What is stored under the keys of annotators."""
    of_annotator: dict[str, list[str]] = {}
    for annotator_id, idem_key in keys:
        of_annotator.setdefault(annotator_id, []).append(idem_key)
    found = [
        row
        for annotator_id, theirs in of_annotator.items()
        for row in connection.execute(_UNDER, {"annotator_id": annotator_id, "idem_keys": theirs})
    ]
    return {(row.annotator_id, row.idem_key): Feedback(**row._mapping) for row in found}


def _row(opinion: Opinion, digest: str, annotator_id: str, inference_id: str | None, metric_id: str | None) -> Feedback:
    id, now = new_id("fb-"), datetime.now(UTC)
    return Feedback(
        id=id,
        first_id=id,
        supersedes_id=None,
        kind=opinion.kind,
        target_type=opinion.target_type,
        target_id=opinion.target_id,
        inference_id=inference_id,
        metric_id=metric_id,
        annotator_id=annotator_id,
        api_key_id=opinion.author.api_key_id,
        value=opinion.value,
        rationale=opinion.rationale,
        presentation=opinion.presentation,
        source=opinion.source,
        # Without a key of theirs it is like nothing else that they will ever send.
        idem_key=opinion.idem_key if opinion.idem_key is not None else id,
        body_sha256=digest,
        occurred_at=opinion.occurred_at or now,
        received_at=now,
    )


# An opinion that is ``storable`` has nothing left in it for ``Words`` to replace.
_INSERT = insert(feedback).values(
    {name: bindparam(name, type_=Text() if isinstance(column.type, Words) else column.type) for name, column in feedback.c.items()}
)


def _insert(connection: Connection, rows: Sequence[Feedback]) -> None:
    if rows:
        connection.execute(_INSERT, [fields_of(row) for row in rows])
    places = [
        {"feedback_id": row.id, "completion_id": id, "rank": rank}
        for row in rows
        if row.kind == "ranking"
        for rank, tier in enumerate(row.value, start=1)
        for id in tier
    ]
    if places:
        connection.execute(insert(rank_entry), places)


def _repeated(before: Feedback, digest: str) -> Outcome:
    if before.body_sha256 == digest:
        return Accepted(before, False)
    message = f"under this idempotency key something else was said already, as {before.id!r}; a new opinion needs a new key"
    return Refused("idempotency_conflict", message, "Idempotency-Key")


def _visible(connection: Connection, author: Author, within: str | None, *, every: bool) -> list[ColumnElement[bool]] | None:
    """What narrows feedback down to what an author may see; None: there is none."""
    conditions = [] if within is None else [feedback.c.inference_id == within]
    if every:
        return conditions
    annotator = annotators.known(connection, author)
    return None if annotator is None else [feedback.c.annotator_id == annotator.id, *conditions]


def unknown(id: str) -> Refused:
    """What is said of an id that an author may not see."""
    # Somebody else's is as good as none: whether it exists is nobody else's business.
    return Refused("not_found", f"there is no feedback {id!r} of this author", "id")


def _not_active(connection: Connection, old: Feedback) -> Refused:
    if old.state != "superseded":
        return Refused("superseded", f"feedback {old.id!r} is {old.state} and stays as it is; say it anew", "id")
    newest: Row[Any] = connection.execute(
        select(feedback.c.id).where(feedback.c.first_id == old.first_id, feedback.c.state != "superseded")
    ).one()
    return Refused("superseded", f"feedback {old.id!r} was superseded; the newest is {newest.id!r}", "id")
