"""Rounds: recorded once, of what there is and may still be trained on; and what they say of the policies that they made."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest
from sqlalchemy import update

from alignkit_serve.store import Store, StoreError, policies, rounds
from alignkit_serve.store.rounds import Round
from alignkit_serve.store.tables import export
from tests.serve.store.rows import a_round, an_export, stored_policy


def record(store: Store, made: Round) -> tuple[Round, bool]:
    return store.write(lambda connection: rounds.add(connection, made)).result()


def taint(store: Store, id: str) -> None:
    tainted = update(export).where(export.c.id == id).values(tainted_at=datetime(2026, 5, 5, tzinfo=UTC))
    store.write(lambda connection: connection.execute(tainted)).result()


def test_a_round_comes_back_as_it_was_recorded_and_its_policy_knows_where_it_is_from(store: Store) -> None:
    parent, child = stored_policy(store, name="sft"), stored_policy(store, name="ppo")
    data, held_out = an_export(store), an_export(store, split="holdout")
    made = a_round(parent, child, held_out, data, metrics={"win_rate": 0.61, "agreement": {"value": None}, "note": "é\x00"})
    kept, news = record(store, made)
    assert news
    assert kept == replace(made, exports=tuple(sorted([data.id, held_out.id])), metrics={**made.metrics, "note": "é\ufffd"})
    assert store.read(rounds.listed) == [kept]
    assert store.read(lambda connection: rounds.get(connection, made.id)) == kept
    assert store.read(lambda connection: rounds.known(connection, "round-1", child.id)) == kept
    assert store.read(lambda connection: rounds.of_policies(connection, [child.id])) == [kept]
    assert store.read(lambda connection: rounds.of_policies(connection, [parent.id])) == []
    assert store.read(lambda connection: rounds.of_exports(connection, [data.id])) == [kept]
    assert store.read(lambda connection: rounds.get(connection, "none")) is None
    came = store.read(lambda connection: policies.get(connection, child.id))
    assert came == replace(child, parent_id=parent.id, evaluation=kept.metrics)


def test_the_same_again_is_the_same_round(store: Store) -> None:
    parent, child = stored_policy(store), stored_policy(store)
    a, b = an_export(store), an_export(store)
    first, _ = record(store, a_round(parent, child, a, b, promoted=False))
    local = timezone(timedelta(hours=2))
    moved = {"started_at": first.started_at.astimezone(local), "finished_at": first.finished_at.astimezone(local)}
    assert record(store, a_round(parent, child, b, a, b, promoted=False, **moved)) == (first, False)
    later, news = record(store, a_round(parent, child, a, b))
    assert (later, news) == (replace(first, promoted=True), True)
    assert record(store, a_round(parent, child, a, b)) == (later, False)
    assert store.read(rounds.listed) == [later]


def test_a_round_that_says_something_else_is_another_one(store: Store) -> None:
    parent, child = stored_policy(store), stored_policy(store)
    a, b = an_export(store), an_export(store)
    first, _ = record(store, a_round(parent, child, a))
    for other, named in (
        (a_round(parent, child, b), "exports"),
        (a_round(parent, child, a, config_sha256="c1" * 32), "config_sha256"),
        (a_round(parent, child, a, metrics={"win_rate": 0.62}), "metrics"),
    ):
        with pytest.raises(StoreError, match=f"with another {named}: .* needs another name"):
            record(store, other)
    with pytest.raises(StoreError, match="its policy was promoted; roll back to undo that"):
        record(store, replace(first, promoted=False))
    assert store.read(rounds.listed) == [first]


def test_a_round_is_of_policies_and_exports_that_there_are(store: Store) -> None:
    parent, child, third = stored_policy(store, name="a"), stored_policy(store, name="b"), stored_policy(store, name="c")
    nobody = replace(child, id="nobody")
    with pytest.raises(StoreError, match="no policy with the id 'nobody'; stage it first"):
        record(store, a_round(parent, nobody))
    with pytest.raises(StoreError, match="no export with the id 'exp-none'"):
        record(store, a_round(parent, child, exports=("exp-none",)))
    with pytest.raises(StoreError, match="which is the same or came from it"):
        record(store, a_round(parent, parent))
    record(store, a_round(parent, child))
    record(store, a_round(child, third, name="round-2"))
    with pytest.raises(StoreError, match="policy 'a' cannot have come from 'c', which is the same or came from it"):
        record(store, a_round(third, parent))
    with pytest.raises(StoreError, match=f"policy 'c' came from '{child.id}', and cannot have come from 'a' too"):
        record(store, a_round(parent, third, name="round-3"))
    versions = store.read(policies.listed)
    assert [version.name for version in policies.ancestors(versions, third.id)] == ["b", "a"]
    assert [version.name for version in policies.descendants(versions, {parent.id})] == ["a", "b", "c"]
    assert policies.ancestors(versions, "nobody") == []


def test_what_holds_erased_feedback_is_in_no_round_any_more(store: Store) -> None:
    parent, child, other = stored_policy(store), stored_policy(store), stored_policy(store)
    data = an_export(store, name="may")
    recorded, _ = record(store, a_round(parent, child, data, promoted=False))
    taint(store, data.id)
    message = "export 'may' .* holds what was erased at 2026-05-05 00:00 and is in no round any more; make one under another name"
    with pytest.raises(StoreError, match=message):
        record(store, a_round(parent, other, data))
    with pytest.raises(StoreError, match=message):
        record(store, replace(recorded, promoted=True))
    assert record(store, recorded) == (recorded, False)
