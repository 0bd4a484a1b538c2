"""The audit: whatever a hand does to its rows is told, and by how many processes it is written is not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import Connection, delete, insert, update
from sqlalchemy.sql.dml import UpdateBase

from alignkit_serve.store import Store
from alignkit_serve.store.audit import Entry, _hash, entries, record, verify
from alignkit_serve.store.tables import audit, fields_of

DETAIL = {"scopes": ["infer"], "rate": 1e23, "small": 1e-7, "zero": -0.0, "deep": {"NUL": "\x00", "half": "\ud800", "none": None}}


def recorded(store: Store, rows: int) -> list[Entry]:
    return [
        store.write(lambda connection, row=row: record(connection, "ann", "key.create", f"key-{row}", DETAIL)).result()
        for row in range(rows)
    ]


def test_rows_are_chained_and_listed_newest_first(store: Store) -> None:
    assert store.read(verify) is None
    before = datetime.now(UTC)
    first, second, third = recorded(store, 3)
    assert (first.seq, second.seq, third.seq) == (1, 2, 3)
    assert first.prev_hash == "0" * 64
    assert (second.prev_hash, third.prev_hash) == (first.hash, second.hash)
    assert before <= first.at <= datetime.now(UTC)
    assert (first.actor, first.action, first.object) == ("ann", "key.create", "key-0")
    assert first.detail["deep"] == {"NUL": "\ufffd", "half": "\ufffd", "none": None}
    assert store.read(verify) is None
    assert store.read(lambda connection: entries(connection, 2)) == [third, second]


def at(seq: int) -> Any:
    return audit.c.seq == seq


def swap(connection: Connection) -> None:
    for old, new in ((2, 99), (3, 2), (99, 3)):
        connection.execute(update(audit).where(at(old)).values(seq=new))


def statement(made: UpdateBase) -> Callable[[Connection], object]:
    return lambda connection: connection.execute(made)


def forge(connection: Connection) -> None:
    """Someone who knows how the hash is made, and makes that of the row he changed good again."""
    second = next(entry for entry in entries(connection, 10) if entry.seq == 2)
    row = {**fields_of(second), "actor": "bob"}
    claims = {name: value for name, value in row.items() if name not in ("prev_hash", "hash")}
    connection.execute(update(audit).where(at(2)).values(actor="bob", hash=_hash(second.prev_hash, claims)))


def insert_one(connection: Connection) -> None:
    for seq in (4, 3, 2):
        connection.execute(update(audit).where(at(seq)).values(seq=seq + 1))
    row = {"seq": 2, "at": datetime.now(UTC), "actor": "eve", "action": "a", "object": "o", "detail": {}}
    before = next(entry.hash for entry in entries(connection, 10) if entry.seq == 1)
    connection.execute(insert(audit), {**row, "prev_hash": before, "hash": _hash(before, row)})


DAMAGE: dict[str, tuple[Callable[[Connection], object], str]] = {
    "an edited actor": (statement(update(audit).where(at(2)).values(actor="bob")), "row 2 of the audit was changed"),
    "an edited detail": (statement(update(audit).where(at(3)).values(detail={})), "row 3 of the audit was changed"),
    "an edited time": (statement(update(audit).where(at(1)).values(at=datetime(2020, 1, 1, tzinfo=UTC))), "row 1 of the audit was changed"),
    "an edited hash": (statement(update(audit).where(at(2)).values(hash="0" * 64)), "row 2 of the audit was changed"),
    "a deleted row": (statement(delete(audit).where(at(2))), "row 2 of the audit is missing: the next one is 3"),
    "the first row deleted": (statement(delete(audit).where(at(1))), "row 1 of the audit is missing: the next one is 2"),
    "two rows swapped": (swap, "row 2 of the audit is out of order"),
    "a forged row": (forge, "row 3 of the audit is out of order"),
    "a row put in": (insert_one, "row 3 of the audit is out of order"),
}


@pytest.mark.parametrize("hand", DAMAGE)
def test_a_chain_broken_by_hand_is_told_with_the_first_broken_row(store: Store, hand: str) -> None:
    recorded(store, 4)
    damage, words = DAMAGE[hand]
    store.write(damage).result()
    broken = store.read(verify)
    assert broken is not None
    assert broken.startswith(words)


def test_the_chain_holds_when_two_stores_write_at_once(database_url: str) -> None:
    with Store.open(database_url) as one, Store.open(database_url) as other:
        threads = [threading.Thread(target=recorded, args=(store, 25)) for store in (one, other) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert one.read(verify) is None
        assert [entry.seq for entry in other.read(lambda connection: entries(connection, 1000))] == list(range(150, 0, -1))
