"""Browsers that somebody signed in at with a key: a session lasts a working day, and no longer than its key."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection, delete, insert, select

from alignkit_serve.store.ids import new_id
from alignkit_serve.store.tables import fields_of, session

LASTS = timedelta(hours=12)


@dataclass(frozen=True, slots=True)
class Session:
    """``api_key_id``: whose it is."""

    id: str
    api_key_id: str
    created_at: datetime
    expires_at: datetime


def begin(connection: Connection, api_key_id: str, now: datetime) -> Session:
    """A new session. Those that are over are removed."""
    connection.execute(delete(session).where(session.c.expires_at <= now))
    made = Session(new_id("ses-"), api_key_id, now, now + LASTS)
    connection.execute(insert(session), fields_of(made))
    return made


def find(connection: Connection, id: str, now: datetime) -> Session | None:
    """The session with that id, if it is not over."""
    row = connection.execute(select(session).where(session.c.id == id, session.c.expires_at > now)).one_or_none()
    return Session(**row._mapping) if row else None


def end(connection: Connection, id: str) -> None:
    """End a session; one that is over stays so."""
    connection.execute(delete(session).where(session.c.id == id))
