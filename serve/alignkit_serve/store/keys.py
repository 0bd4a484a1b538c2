"""API keys. ``ak_<12 public>_<43 secret>``: the public part finds the row, and of the secret only the sha256 is stored.

A secret has 256 random bits, so that no slow hash is needed: there is nothing to guess.
"""

from __future__ import annotations

import difflib
import hashlib
import hmac
import re
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Row, insert, or_, select, update

from alignkit_serve.store.errors import StoreError
from alignkit_serve.store.ids import new_id
from alignkit_serve.store.tables import api_key, fields_of

SCOPES = ("infer", "feedback:write", "feedback:read", "label", "export", "admin")
"""All that a key can be allowed."""

_LETTERS = string.ascii_letters + string.digits
_KEY = re.compile("ak_([A-Za-z0-9]{12})_([A-Za-z0-9]{43})")


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What is known of a key, which is not enough to use it. ``rate_rpm``: requests a minute."""

    id: str
    public_id: str
    name: str
    scopes: tuple[str, ...]
    rate_rpm: int | None
    max_inflight: int | None
    created_by: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None


_COLUMNS = [api_key.c[name] for name in KeyRecord.__dataclass_fields__]


def create(
    connection: Connection,
    name: str,
    scopes: Sequence[str],
    *,
    rate_rpm: int | None = None,
    max_inflight: int | None = None,
    expires_at: datetime | None = None,
    created_by: str,
) -> tuple[KeyRecord, str]:
    """A new key and its text, which is nowhere else and cannot be had again. Raises ``StoreError`` for scopes and limits that are none."""
    _check_scopes(scopes)
    for limit, value in (("rate_rpm", rate_rpm), ("max_inflight", max_inflight)):
        if value is not None and value < 1:
            raise StoreError(f"{limit} is {value}; allowed: 1 or more, or nothing for no limit")
    public_id, secret = _random(12), _random(43)
    record = KeyRecord(
        id=new_id("key-"),
        public_id=public_id,
        name=name,
        scopes=tuple(scope for scope in SCOPES if scope in scopes),
        rate_rpm=rate_rpm,
        max_inflight=max_inflight,
        created_by=created_by,
        created_at=datetime.now(UTC),
        expires_at=expires_at,
        revoked_at=None,
        last_used_at=None,
    )
    connection.execute(insert(api_key), {**fields_of(record), "secret_sha256": _hashed(secret)})
    return record, f"ak_{public_id}_{secret}"


def find(connection: Connection, text: str) -> KeyRecord | None:
    """The key whose text this is, if it is in force: neither revoked nor expired."""
    match = _KEY.fullmatch(text)
    row = match and connection.execute(select(api_key.c.secret_sha256, *_COLUMNS).where(api_key.c.public_id == match[1])).one_or_none()
    if not match or not row or not hmac.compare_digest(row.secret_sha256, _hashed(match[2])):
        return None
    return _in_force(_record(row))


def in_force(connection: Connection, id: str) -> KeyRecord | None:
    """The key with that id, if it is in force."""
    row = connection.execute(select(*_COLUMNS).where(api_key.c.id == id)).one_or_none()
    return _in_force(_record(row)) if row else None


def revoke(connection: Connection, public_id: str) -> KeyRecord:
    """Put a key out of force; one that is stays as it was. Raises ``StoreError`` where there is none of that public id."""
    mine = api_key.c.public_id == public_id
    connection.execute(update(api_key).where(mine, api_key.c.revoked_at.is_(None)).values(revoked_at=datetime.now(UTC)))
    row = connection.execute(select(*_COLUMNS).where(mine)).one_or_none()
    if row is None:
        raise StoreError(f"there is no API key {public_id!r}; its public id is what stands between the two underscores of its text")
    return _record(row)


def listed(connection: Connection) -> list[KeyRecord]:
    """All keys, oldest first, those out of force too."""
    return [_record(row) for row in connection.execute(select(*_COLUMNS).order_by(api_key.c.id))]


def touch(connection: Connection, id: str, at: datetime) -> None:
    """Note that a key was used; an earlier time changes nothing."""
    earlier = or_(api_key.c.last_used_at.is_(None), api_key.c.last_used_at < at)
    connection.execute(update(api_key).where(api_key.c.id == id, earlier).values(last_used_at=at))


def _in_force(record: KeyRecord) -> KeyRecord | None:
    expired = record.expires_at is not None and record.expires_at <= datetime.now(UTC)
    return None if expired or record.revoked_at else record


def _check_scopes(scopes: Sequence[str]) -> None:
    if not scopes:
        raise StoreError(f"an API key without scopes could do nothing; allowed: {', '.join(SCOPES)}")
    for scope in scopes:
        if scope not in SCOPES:
            near = difflib.get_close_matches(scope, SCOPES, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise StoreError(f"{scope!r} is no scope of an API key{hint}; allowed: {', '.join(SCOPES)}")


def _random(length: int) -> str:
    return "".join(secrets.choice(_LETTERS) for _ in range(length))


def _hashed(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _record(row: Row[Any]) -> KeyRecord:
    values = row._mapping
    return KeyRecord(**{column.name: values[column.name] for column in _COLUMNS} | {"scopes": tuple(values["scopes"])})
