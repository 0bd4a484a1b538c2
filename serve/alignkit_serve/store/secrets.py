"""Keys for hashes that must be the same tomorrow: made once, kept with what they protect, and in no export."""

from __future__ import annotations

from secrets import token_hex

from sqlalchemy import Connection, insert, select

from alignkit_serve.store.tables import secret as table


def secret(connection: Connection, name: str) -> bytes:
    """The secret of that name, 32 random bytes; the first call makes it, in a transaction that writes."""
    found = connection.execute(select(table.c.value).where(table.c.name == name)).scalar_one_or_none()
    if found is None:
        found = token_hex(32)
        connection.execute(insert(table).values(name=name, value=found))
    return bytes.fromhex(found)
