"""API keys: the text opens, nothing stored does, and what is out of force opens no more."""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select

from alignkit_serve.store import Store, StoreError
from alignkit_serve.store.keys import SCOPES, KeyRecord, create, find, listed, revoke, touch
from alignkit_serve.store.tables import api_key


def made(store: Store, *scopes: str, expires_at: datetime | None = None) -> tuple[KeyRecord, str]:
    return store.write(
        lambda connection: create(connection, "laptop", scopes or ("infer",), expires_at=expires_at, created_by="test")
    ).result()


def found(store: Store, text: str) -> KeyRecord | None:
    return store.read(lambda connection: find(connection, text))


def test_a_key_is_found_by_its_text_and_only_a_hash_of_it_is_stored(store: Store) -> None:
    record, text = store.write(
        lambda connection: create(connection, "CI", ["label", "infer"], rate_rpm=60, max_inflight=4, created_by="ann")
    ).result()
    assert re.fullmatch("ak_[A-Za-z0-9]{12}_[A-Za-z0-9]{43}", text)
    assert (record.name, record.scopes, record.rate_rpm, record.max_inflight) == ("CI", ("infer", "label"), 60, 4)
    assert (record.created_by, record.expires_at, record.revoked_at, record.last_used_at) == ("ann", None, None, None)
    assert found(store, text) == record
    _, public_id, secret = text.split("_")
    assert record.public_id == public_id
    row = store.read(lambda connection: connection.execute(select(api_key))).one()
    assert secret not in repr(row)
    assert row.secret_sha256 == hashlib.sha256(secret.encode()).hexdigest()


def test_two_keys_are_told_apart(store: Store) -> None:
    (first, one), (second, other) = made(store), made(store)
    assert (found(store, one), found(store, other)) == (first, second)
    mixed = f"{one[:16]}{other[16:]}"
    assert found(store, mixed) is None
    assert store.read(listed) == [first, second]


@pytest.mark.parametrize(
    "wrong", ["", "ak_", "nonsense", "Bearer {}", "{}\n", " {}", "{}x", "{}\0", "ak_ünïcödé1234_" + "a" * 43, "sk-" + "a" * 48]
)
def test_a_text_of_another_form_is_no_key(store: Store, wrong: str) -> None:
    _, text = made(store)
    assert found(store, wrong.format(text)) is None


def test_one_wrong_letter_anywhere_opens_nothing(store: Store) -> None:
    _, text = made(store)
    for place in range(len(text)):
        assert found(store, f"{text[:place]}{'x' if text[place] != 'x' else 'y'}{text[place + 1 :]}") is None, place


def test_a_revoked_key_is_not_found_and_stays_in_the_list(store: Store) -> None:
    record, text = made(store)
    revoked = store.write(lambda connection: revoke(connection, record.public_id)).result()
    assert revoked.revoked_at is not None
    assert found(store, text) is None
    assert store.read(listed) == [revoked]
    assert store.write(lambda connection: revoke(connection, record.public_id)).result() == revoked
    with pytest.raises(StoreError, match="there is no API key 'nobody'; its public id is what stands between the two underscores"):
        store.write(lambda connection: revoke(connection, "nobody")).result()


def test_an_expired_key_is_not_found(store: Store) -> None:
    _, past = made(store, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    record, future = made(store, expires_at=datetime.now(UTC) + timedelta(days=1))
    assert found(store, past) is None
    assert found(store, future) == record


def test_the_last_use_never_goes_back(store: Store) -> None:
    record, text = made(store)
    late, early = datetime(2026, 5, 2, tzinfo=UTC), datetime(2026, 5, 1, tzinfo=UTC)
    for at in (early, late, early):
        store.write(lambda connection, at=at: touch(connection, record.id, at)).result()
    after = found(store, text)
    assert after is not None
    assert after.last_used_at == late


def test_scopes_and_limits_that_are_none_are_refused_with_what_is_allowed(store: Store) -> None:
    allowed = ", ".join(SCOPES)
    with pytest.raises(
        StoreError, match=re.escape(f"'feedback:wirte' is no scope of an API key (did you mean feedback:write?); allowed: {allowed}")
    ):
        made(store, "infer", "feedback:wirte")
    with pytest.raises(StoreError, match=re.escape(f"'*' is no scope of an API key; allowed: {allowed}")):
        made(store, "*")
    with pytest.raises(StoreError, match=f"an API key without scopes could do nothing; allowed: {allowed}"):
        store.write(lambda connection: create(connection, "empty", [], created_by="test")).result()
    with pytest.raises(StoreError, match="max_inflight is 0; allowed: 1 or more, or nothing for no limit"):
        store.write(lambda connection: create(connection, "none", ["infer"], max_inflight=0, created_by="test")).result()
    assert store.read(listed) == []
