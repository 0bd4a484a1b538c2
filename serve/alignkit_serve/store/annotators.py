"""Who judges: the holder of a key, a person at the other end of somebody's application, or, without authentication, anyone.

Only a hash of who it is is stored, under a secret that is in no export.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sqlalchemy import Connection, bindparam, insert, select, update

from alignkit_serve.store.ids import new_id
from alignkit_serve.store.secrets import secret
from alignkit_serve.store.tables import annotator, api_key, fields_of

Kind = Literal["expert", "end_user", "model"]

END_USERS = "end-users"
"""The name of the secret under which the names of end users are hashed."""


@dataclass(frozen=True, slots=True)
class Author:
    """Whom a request comes from. ``subject``: the hash of an end user; None: the holder of the key, or of none."""

    api_key_id: str | None
    subject: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotator:
    """What is known of one who judges. A new one is in probation: nobody knows yet how far to trust them."""

    id: str
    subject_hmac: str
    kind: Kind
    weight: float = 1.0
    status: Literal["active", "probation", "blocked"] = "probation"
    consent_version: str | None = None
    consent_at: datetime | None = None


_COLUMNS = [annotator.c[name] for name in Annotator.__dataclass_fields__]
_OF_KEY = select(*_COLUMNS).join(api_key, api_key.c.annotator_id == annotator.c.id).where(api_key.c.id == bindparam("key"))
_OF_SUBJECT = select(*_COLUMNS).where(annotator.c.subject_hmac == bindparam("subject"))


def known(connection: Connection, author: Author) -> Annotator | None:
    """The annotator that an author is, if they ever judged anything. A key's is the one that it was given, if it was given one."""
    if author.subject is None and author.api_key_id is not None:
        row = connection.execute(_OF_KEY, {"key": author.api_key_id}).one_or_none()
    else:
        row = connection.execute(_OF_SUBJECT, {"subject": author.subject or _ANYONE}).one_or_none()
    return Annotator(**row._mapping) if row else None


def of(connection: Connection, author: Author) -> Annotator:
    """The annotator that an author is, from now on if not before."""
    if found := known(connection, author):
        return found
    keys_own = author.subject is None and author.api_key_id is not None
    subject = _hashed(connection, author.api_key_id or "") if keys_own else author.subject or _ANYONE
    made = Annotator(id=new_id("ann-"), subject_hmac=subject, kind="expert" if keys_own else "end_user")
    connection.execute(insert(annotator), fields_of(made))
    if keys_own:
        connection.execute(update(api_key).where(api_key.c.id == author.api_key_id).values(annotator_id=made.id))
    return made


def end_user(secret: bytes, name: str) -> str:
    """The hash under which an end user is known, by the name that their application has for them."""
    return hmac.new(secret, name.encode(errors="replace"), hashlib.sha256).hexdigest()


_ANYONE = "anyone"
"""The subject of those who ask without a key: no hash, and so nobody else's."""


def _hashed(connection: Connection, api_key_id: str) -> str:
    return hmac.new(secret(connection, "annotators"), api_key_id.encode(), hashlib.sha256).hexdigest()
