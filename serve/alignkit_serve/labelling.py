"""What somebody enters of an assignment, and the feedback that it is: one ranking, a rating of each answer, its flags, and a comment."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from sqlalchemy import Connection

from alignkit_serve.judgements import Flag
from alignkit_serve.store import StoreError, feedback, labels
from alignkit_serve.store.annotators import Author
from alignkit_serve.store.feedback import Feedback, Opinion, Outcome, Refused
from alignkit_serve.store.labels import Assignment

UI_VERSION = "label-1"
"""Names the page as it is: what is asked, and how. Another wording needs another name."""

FLAGS: tuple[str, ...] = get_args(Flag)

_LETTERS = "ABCDEFGHI"
_COMMENT = 10_000


class Refusal(StoreError):
    """Something of what was entered cannot be said; nothing of it is stored."""


class Card(BaseModel):
    """What is said of one answer; None: not yet. Of ranks, 1 is the best, and equal ones are ties."""

    model_config = ConfigDict(extra="forbid")

    rank: Annotated[int, Field(ge=1, le=9)] | None = None
    rating: Annotated[int, Field(ge=1, le=7)] | None = None
    flags: Annotated[list[Flag], Field(max_length=len(FLAGS))] = Field(default_factory=list)


class Sheet(BaseModel):
    """All that is entered of an assignment, its cards in the order in which they are shown. ``dwell_ms``: how long it was in sight."""

    model_config = ConfigDict(extra="forbid")

    cards: Annotated[list[Card], Field(min_length=2, max_length=9)]
    comment: Annotated[str, StringConstraints(max_length=_COMMENT)] = ""
    dwell_ms: Annotated[int, Field(ge=0, lt=1 << 53)] | None = None


def letter(slot: int) -> str:
    """What an answer is called where nobody is to know where it comes from."""
    return _LETTERS[slot]


def sheet_of(given: Assignment) -> Sheet:
    """What was entered so far."""
    return Sheet.model_validate(given.draft) if given.draft else Sheet(cards=[Card() for _ in given.slots])


def sheet_from(fields: Sequence[tuple[str, str]], slots: int) -> Sheet:
    """What a form holds; what is no number, or none of those asked for, is as good as not entered."""
    single = dict(fields)
    ticked = {(name, value) for name, value in fields if value in FLAGS}
    cards = [
        Card.model_validate(
            {
                "rank": _number(single.get(f"rank-{slot}", ""), 9),
                "rating": _number(single.get(f"rating-{slot}", ""), 7),
                "flags": [flag for flag in FLAGS if (f"flag-{slot}", flag) in ticked],
            }
        )
        for slot in range(slots)
    ]
    comment = single.get("comment", "").replace("\r\n", "\n")[:_COMMENT]
    dwell = single.get("dwell_ms", "")
    return Sheet(cards=cards, comment=comment, dwell_ms=int(dwell) if re.fullmatch("[0-9]{1,15}", dwell) else None)


def missing(sheet: Sheet) -> list[tuple[int, str]]:
    """What must still be entered: the slot, and in words what."""
    unrated = [(slot, f"Answer {letter(slot)} has no rating.") for slot, card in enumerate(sheet.cards) if card.rating is None]
    return unrated + [(slot, f"Answer {letter(slot)} has no rank.") for slot, card in enumerate(sheet.cards) if card.rank is None]


def hand_in(connection: Connection, id: str, author: Author, sheet: Sheet, now: datetime) -> list[Outcome]:
    """Submit an assignment and say what was entered, both or neither; sent twice, it is said once.

    Of what was submitted before, only what changed is said anew, in place of the old. Raises as ``labels.submit``, and ``Refusal``.
    """
    before = labels.get(connection, id, author)
    if before.state == "submitted":
        return []
    held = labels.submit(connection, id, author, sheet.model_dump(), now)
    given = labels.said(connection, held)
    group_id = labels.material(connection, held).group_id
    said = _opinions(held, group_id, sheet, author, now)
    active = {_subject(one): one for one in given if one.state == "active"}
    # So many were said before: under the key of one that was taken back since, nothing new can be said.
    new = [_keyed(one, held, len(given)) for subject, one in said.items() if subject not in active]
    outcomes = feedback.add(connection, new)
    for subject, old in active.items():
        if subject not in said:
            feedback.retract(connection, old.id, author)
        elif said[subject].value != old.value:
            outcomes.append(feedback.revise(connection, old.id, _keyed(said[subject], held, len(given))))
    for outcome in outcomes:
        if isinstance(outcome, Refused):
            raise Refusal(outcome.message)
    return outcomes


def set_aside(connection: Connection, id: str, author: Author, reason: str, now: datetime) -> Assignment:
    """Skip an assignment; what was said in it before is taken back. Raises as ``labels.skip``."""
    skipped = labels.skip(connection, id, author, reason, now)
    for one in labels.said(connection, skipped):
        if one.state == "active":
            feedback.retract(connection, one.id, author)
    return skipped


def _opinions(held: Assignment, group_id: str, sheet: Sheet, author: Author, now: datetime) -> dict[tuple[str, str, str], Opinion]:
    """By what each is about."""
    elapsed = max(now - held.started_at, timedelta()) // timedelta(milliseconds=1)
    shown = {
        "slots": list(held.slots),
        "seed": held.seed,
        "ui_version": UI_VERSION,
        "dwell_ms": elapsed if sheet.dwell_ms is None else min(sheet.dwell_ms, elapsed),
    }

    def say(kind: feedback.Kind, target_type: feedback.TargetType, target_id: str, value: Any) -> Opinion:
        return Opinion(
            author=author, kind=kind, target_type=target_type, target_id=target_id, value=value, presentation=shown, source="page"
        )

    cards = list(zip(held.slots, sheet.cards, strict=True))
    ranks = sorted({card.rank for _, card in cards if card.rank is not None})
    opinions = [say("ranking", "group", group_id, [[id for id, card in cards if card.rank == rank] for rank in ranks])]
    opinions += [say("rating", "completion", id, card.rating) for id, card in cards]
    opinions += [say("flag", "completion", id, flag) for id, card in cards for flag in card.flags]
    if sheet.comment.strip():
        opinions.append(say("comment", "group", group_id, sheet.comment))
    return {_subject(one): one for one in opinions}


def _subject(one: Opinion | Feedback) -> tuple[str, str, str]:
    return one.kind, one.target_id, one.value if one.kind == "flag" else ""


def _keyed(one: Opinion, held: Assignment, before: int) -> Opinion:
    return replace(one, idem_key="/".join((held.id, str(before), *_subject(one))))


def _number(text: str, most: int) -> int | None:
    text = text.strip()
    return int(text) if re.fullmatch("[1-9]", text) and int(text) <= most else None
