"""Which policies saw a piece of feedback, and what a policy is made of. Both ways go through exports and rounds, and along indexes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, func, select

from alignkit_serve.store import feedback as opinions
from alignkit_serve.store import policies, rounds
from alignkit_serve.store.feedback import Feedback
from alignkit_serve.store.policies import PolicyVersion
from alignkit_serve.store.rounds import Round
from alignkit_serve.store.tables import export, export_row, feedback


@dataclass(frozen=True, slots=True)
class Exported:
    """An export, as far as it is of interest where something went."""

    id: str
    name: str
    shape: str
    split: str
    n_rows: int
    path: str
    created_at: datetime
    tainted_at: datetime | None


@dataclass(frozen=True, slots=True)
class Place:
    """A row of an export that a piece of feedback is in."""

    export_id: str
    row_no: int
    feedback_id: str
    weight: float


@dataclass(frozen=True, slots=True)
class Reach:
    """Where exports went: the rounds that trained on them, and the policies that came out, with all that came from those."""

    exports: tuple[Exported, ...]
    rounds: tuple[Round, ...]
    policies: tuple[PolicyVersion, ...]


@dataclass(frozen=True, slots=True)
class OfFeedback:
    """``history``: what superseded it and what it superseded, the oldest first; ``places`` and ``reach`` are of all of them."""

    feedback: Feedback
    history: tuple[Feedback, ...]
    places: tuple[Place, ...]
    reach: Reach


@dataclass(frozen=True, slots=True)
class OfPolicy:
    """What a policy is made of. ``rounds`` made it, of ``exports``, in which there is so much ``feedback`` by kind.

    ``annotators``: the share of that feedback that each gave. ``tainted``: exports with erased feedback among its own and its ancestors'.
    """

    policy: PolicyVersion
    ancestors: tuple[PolicyVersion, ...]
    rounds: tuple[Round, ...]
    exports: tuple[Exported, ...]
    feedback: Mapping[str, int]
    annotators: Mapping[str, float]
    tainted: tuple[Exported, ...]


_EXPORTED = [export.c[name] for name in Exported.__dataclass_fields__]
_PLACE = [export_row.c[name] for name in Place.__dataclass_fields__]


def of_feedback(connection: Connection, id: str) -> OfFeedback | None:
    """Where a piece of feedback went; None: there is none of that id."""
    row = connection.execute(select(feedback.c.first_id).where(feedback.c.id == id)).one_or_none()
    if row is None:
        return None
    history = opinions.history(connection, row.first_id)
    mine = export_row.c.feedback_id.in_([each.id for each in history])
    found = select(*_PLACE).where(mine).order_by(export_row.c.export_id, export_row.c.row_no, export_row.c.feedback_id)
    places = tuple(Place(*row) for row in connection.execute(found))
    return OfFeedback(
        feedback=next(each for each in history if each.id == id),
        history=tuple(history),
        places=places,
        reach=reach(connection, {place.export_id for place in places}),
    )


def of_policy(connection: Connection, name: str) -> OfPolicy | None:
    """What the policy of that name or id is made of; None: there is none."""
    policy = policies.get(connection, name) or policies.by_name(connection, name)
    if policy is None:
        return None
    ancestors = policies.ancestors(policies.listed(connection), policy.id)
    made = rounds.of_policies(connection, [policy.id])
    own = {id for each in made for id in each.exports}
    earlier = {id for each in rounds.of_policies(connection, [version.id for version in ancestors]) for id in each.exports}
    kinds, authors = _counted(connection, own)
    return OfPolicy(
        policy=policy,
        ancestors=tuple(ancestors),
        rounds=tuple(made),
        exports=_exported(connection, own),
        feedback=dict(kinds.most_common()),
        annotators={id: count / authors.total() for id, count in authors.most_common()},
        tainted=tuple(each for each in _exported(connection, own | earlier) if each.tainted_at),
    )


def reach(connection: Connection, export_ids: Collection[str]) -> Reach:
    """Where exports went."""
    trained = rounds.of_exports(connection, export_ids)
    came = policies.descendants(policies.listed(connection), {each.child_policy_id for each in trained})
    return Reach(_exported(connection, export_ids), tuple(trained), tuple(came))


def exports(connection: Connection) -> dict[str, Exported]:
    """Every export, by id."""
    return {row.id: Exported(*row) for row in connection.execute(select(*_EXPORTED))}


def _exported(connection: Connection, ids: Collection[str]) -> tuple[Exported, ...]:
    return tuple(Exported(*row) for row in connection.execute(select(*_EXPORTED).where(export.c.id.in_(ids)).order_by(export.c.id)))


def _counted(connection: Connection, export_ids: Collection[str]) -> tuple[Counter[str], Counter[str]]:
    """How much feedback there is in exports, each counted once: by kind, and by annotator."""
    used = select(export_row.c.feedback_id).where(export_row.c.export_id.in_(export_ids)).distinct().subquery()
    groups = (feedback.c.kind, feedback.c.annotator_id)
    found = select(*groups, func.count()).join(used, used.c.feedback_id == feedback.c.id).group_by(*groups)
    kinds, authors = Counter[str](), Counter[str]()
    for kind, annotator_id, count in connection.execute(found):
        kinds[kind] += count
        authors[annotator_id] += count
    return kinds, authors
