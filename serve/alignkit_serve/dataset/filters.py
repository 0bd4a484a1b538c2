"""What goes into an export, and which rules it goes through. Light: the config of a run and the command line are made of it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from alignkit.api import SettingError, setting

Shape = Literal["demonstrations", "rankings", "comparisons", "labels", "prompts"]
Split = Literal["train", "holdout", "all"]
Form = Literal["chat", "text"]

JUDGING = ("thumb", "rating", "metric", "preference", "ranking", "correction", "demonstration", "flag")
"""Kinds of feedback that rows are made of. A comment is for people to read, and never trains."""


NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""What an export may be called: it is the name of a folder, too."""


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Which feedback, and how strictly it is looked at. The same name with other filters is another export, and refused."""

    since: str | None = setting(None, "only feedback received from this time on: ISO 8601, in UTC where no zone is named")
    until: str | None = setting(None, "only feedback received before this time")
    kinds: tuple[str, ...] = setting((), "only these kinds of feedback; none named: all but comments, which never train")
    policies: tuple[str, ...] = setting((), "only answers of these policies, by name or id; none named: of all")
    form: Form = setting("chat", "chat: conversations; text: plain prompts that were continued, by /v1/completions")
    of: Literal["judged", "all"] = setting("judged", "of the shape prompts: those of which something was said, or all")
    probation: int = setting(20, "prompts on which a new annotator must agree with others, over chance, to count; 0: trust all", at_least=0)
    annotator_share: float = setting(0.05, "the most rows that one annotator alone may stand for; 1: no bound", above=0.0, at_most=1.0)
    key_share: float = setting(0.2, "the most rows that may have come with one API key alone; 1: no bound", above=0.0, at_most=1.0)
    rating_gap: int = setting(0, "ratings of one annotator this far apart make a ranking, from 2 on; 0: none do", at_least=0, at_most=6)
    dead_band: float = setting(0.5, "ratings this close to the annotator's own mean are neither good nor bad", at_least=0.0, at_most=6.0)
    burst: int = setting(60, "more judgements of one annotator within a minute are left out; 0: no bound", at_least=0)

    def __post_init__(self) -> None:
        for name in ("since", "until"):
            moment(name, getattr(self, name))
        unknown = [kind for kind in self.kinds if kind not in JUDGING]
        if unknown:
            raise SettingError("kinds", f'names "{unknown[0]}"; allowed: {", ".join(JUDGING)}')
        if self.rating_gap == 1:
            raise SettingError("rating_gap", "is 1, which is noise; allowed: 0 (off), or 2 to 6")

    def as_json(self) -> dict[str, Any]:
        """As it is stored and compared: what says the same is the same, lists in any order too."""
        moments = {name: found.isoformat() if (found := moment(name, getattr(self, name))) else None for name in ("since", "until")}
        named = {name: sorted(set(getattr(self, name))) for name in ("kinds", "policies")}
        return {name: getattr(self, name) for name in self.names()} | moments | named

    @staticmethod
    def names() -> tuple[str, ...]:
        """Of the fields, without those of what may extend it."""
        return tuple(Filters.__dataclass_fields__)


def moment(name: str, text: str | None) -> datetime | None:
    """A point in time as it is written in a config. Raises ``SettingError`` for what is none."""
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise SettingError(name, f'is "{text}"; allowed: a time such as 2026-05-01 or 2026-05-01T12:00:00+02:00') from error
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC)


SHAPES: tuple[Shape, ...] = get_args(Shape)
SPLITS: tuple[Split, ...] = get_args(Split)
FORMS: tuple[Form, ...] = get_args(Form)
