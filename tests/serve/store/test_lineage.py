"""Lineage: from a word to the policies that learnt from it, and from a policy to the words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event

from alignkit_serve.store import Store, database, erasure, lineage, rounds
from alignkit_serve.store.feedback import Accepted, revise
from tests.serve.store.rows import a_round, an_export, stored_policy
from tests.serve.store.test_feedback import a_key, a_thumb, one_answer, said


def record(store: Store, *made: Any) -> None:
    for each in made:
        store.write(lambda connection, each=each: rounds.add(connection, each)).result()


def test_from_feedback_to_every_policy_that_saw_it(store: Store) -> None:
    _, answer = one_answer(store)
    first = said(store, a_thumb(answer))
    newest = store.write(lambda connection: revise(connection, first.id, a_thumb(answer, value="down"))).result()
    assert isinstance(newest, Accepted)
    elsewhere = said(store, a_thumb(answer, author=a_key(store)))
    a, b, c, d = (stored_policy(store, name=name) for name in "abcd")
    may = an_export(store, [elsewhere.id, first.id])
    june = an_export(store, [newest.feedback.id], shape="labels")
    other = an_export(store, [elsewhere.id])
    first_round, second, unseen = a_round(a, b, may), a_round(b, c, june, name="round-2"), a_round(a, d, other, name="round-3")
    record(store, first_round, second, unseen)
    found = store.read(lambda connection: lineage.of_feedback(connection, first.id))
    assert found is not None
    assert (found.feedback.id, [each.id for each in found.history]) == (first.id, [first.id, newest.feedback.id])
    assert [(each.export_id, each.row_no, each.feedback_id, each.weight) for each in found.places] == [
        (may.id, 1, first.id, 1.0),
        (june.id, 0, newest.feedback.id, 1.0),
    ]
    assert [each.id for each in found.reach.exports] == [may.id, june.id]
    assert [each.id for each in found.reach.rounds] == [first_round.id, second.id]
    assert [each.name for each in found.reach.policies] == ["b", "c"]
    same = store.read(lambda connection: lineage.of_feedback(connection, newest.feedback.id))
    assert same is not None
    assert (same.places, same.reach) == (found.places, found.reach)
    assert store.read(lambda connection: lineage.of_feedback(connection, "none")) is None


def test_feedback_that_went_nowhere(store: Store) -> None:
    one = said(store, a_thumb(one_answer(store)[1]))
    found = store.read(lambda connection: lineage.of_feedback(connection, one.id))
    assert found is not None
    assert (found.places, found.reach.exports, found.reach.rounds, found.reach.policies) == ((), (), (), ())


def test_from_a_policy_to_what_it_is_made_of(store: Store) -> None:
    _, answer = one_answer(store)
    mine, busy = a_key(store), a_key(store)
    up = said(store, a_thumb(answer, author=mine))
    rated = [said(store, a_thumb(answer, author=busy, kind="rating", value=value)) for value in (1, 2, 3)]
    a, b, c = (stored_policy(store, name=name) for name in "abc")
    may, june = an_export(store, [up.id]), an_export(store, [up.id, rated[0].id, rated[1].id])
    also = an_export(store, [rated[1].id, rated[2].id])
    first, second = a_round(a, b, may), a_round(b, c, june, also, name="round-2")
    record(store, first, second)
    for name in (c.id, "c"):
        found = store.read(lambda connection, name=name: lineage.of_policy(connection, name))
        assert found is not None
        assert (found.policy.name, [each.name for each in found.ancestors]) == ("c", ["b", "a"])
        assert [each.id for each in found.rounds] == [second.id]
        assert [each.id for each in found.exports] == [june.id, also.id]
        # Feedback is counted once, however many rows it is in.
        assert found.feedback == {"rating": 3, "thumb": 1}
        assert found.annotators == {rated[0].annotator_id: 0.75, up.annotator_id: 0.25}
        assert found.tainted == ()
    store.write(lambda connection: erasure.erase(connection, up.annotator_id, "test")).result()
    tainted = store.read(lambda connection: lineage.of_policy(connection, "c"))
    assert tainted is not None
    assert [each.id for each in tainted.tainted] == [may.id, june.id]
    root = store.read(lambda connection: lineage.of_policy(connection, "a"))
    assert root is not None
    assert (root.ancestors, root.rounds, root.feedback, root.annotators, root.tainted) == ((), (), {}, {}, ())
    assert store.read(lambda connection: lineage.of_policy(connection, "none")) is None


def plans(tmp_path: Path, work: Callable[[Store], object]) -> list[str]:
    """What SQLite would do for each statement that ``work`` makes, in words."""
    statements: list[tuple[str, Any]] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        statements.append((statement, parameters))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        with Store.open(f"sqlite:///{tmp_path / 'plans.db'}") as store:
            statements.clear()
            work(store)
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    reading = database.reading(database.parse(f"sqlite:///{tmp_path / 'plans.db'}"))
    with reading.connect() as connection:
        return [
            row.detail
            for statement, parameters in statements
            if statement.split()[0] in ("SELECT", "UPDATE")
            for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
        ]


def test_neither_way_reads_a_whole_table_of_what_grows(tmp_path: Path) -> None:
    made: list[str] = []

    def work(store: Store) -> None:
        one = said(store, a_thumb(one_answer(store)[1]))
        parent, child = stored_policy(store), stored_policy(store)
        record(store, a_round(parent, child, an_export(store, [one.id])))
        made.extend([one.id, child.id])
        store.read(lambda connection: lineage.of_feedback(connection, one.id))
        store.read(lambda connection: lineage.of_policy(connection, child.id))

    found = plans(tmp_path, work)
    assert any("export_row_feedback" in step for step in found)
    for table in ("feedback", "export_row", "inference", "completion"):
        assert not [step for step in found if step.startswith(f"SCAN {table}")], table
