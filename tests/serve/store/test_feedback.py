"""Feedback in the store: what it is about is there, what was said stays, and the same key says the same thing once."""

from __future__ import annotations

import itertools
import sqlite3
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, event, func, select, text, update

from alignkit_serve.store import Store, StoreError, annotators, database, keys, new_id
from alignkit_serve.store.annotators import Author
from alignkit_serve.store.feedback import Accepted, Feedback, Opinion, Outcome, Refused, add, get, history, listed, retract, revise
from alignkit_serve.store.groups import Group, add_group
from alignkit_serve.store.inferences import begin, delete, finish
from alignkit_serve.store.metrics import Metric, define
from alignkit_serve.store.metrics import get as get_metric
from alignkit_serve.store.metrics import listed as all_metrics
from alignkit_serve.store.tables import annotator, api_key, feedback, inference, rank_entry
from tests.serve.store.rows import a_completion, an_inference, answered, stored_policy

ANYONE = Author(None)


def a_key(store: Store) -> Author:
    return Author(store.write(lambda connection: keys.create(connection, "a", ["feedback:write"], created_by="test")).result()[0].id)


def say(store: Store, *opinions: Opinion) -> list[Outcome]:
    return store.write(lambda connection: add(connection, opinions)).result()


def said(store: Store, opinion: Opinion) -> Feedback:
    (outcome,) = say(store, opinion)
    assert isinstance(outcome, Accepted), outcome
    return outcome.feedback


def refused(store: Store, opinion: Opinion) -> tuple[str, str]:
    (outcome,) = say(store, opinion)
    assert isinstance(outcome, Refused), outcome
    return outcome.code, outcome.message


def a_thumb(target: str, **values: Any) -> Opinion:
    return Opinion(**{"author": ANYONE, "kind": "thumb", "target_type": "completion", "target_id": target, "value": "up", **values})


def one_answer(store: Store, **values: Any) -> tuple[str, str]:
    """The ids of an inference and of its completion."""
    asked, completion = answered(store, stored_policy(store), **values)
    return asked.id, completion.id


def answers(store: Store, count: int) -> tuple[str, list[str], str]:
    """The ids of an inference, of its completions, and of the group that they are in."""
    policy = stored_policy(store)
    asked = an_inference(policy)
    completions = [a_completion(asked, i, text=f"answer {i}") for i in range(count)]
    group = Group(new_id("grp-"), asked.prompt_sha256, "n", None, asked.id, tuple((one.id, i) for i, one in enumerate(completions)))
    store.write(lambda connection: begin(connection, asked)).result()
    store.write(lambda connection: finish(connection, asked.id, completions, status="done", prompt_tokens=1, completion_tokens=1)).result()
    store.write(lambda connection: add_group(connection, group)).result()
    return asked.id, [one.id for one in completions], group.id


def count(store: Store) -> int:
    return store.read(lambda connection: connection.scalar(select(func.count()).select_from(feedback))) or 0


def test_what_is_said_is_there_as_it_was_said(store: Store) -> None:
    inference_id, completion_id = one_answer(store)
    at = datetime(2026, 5, 4, 3, 2, 1, 987654, tzinfo=UTC)
    shown = {"slots": [completion_id], "seed": 7, "ui_version": "1", "dwell_ms": 1200}
    author = a_key(store)
    row = said(store, a_thumb(completion_id, author=author, rationale="short \x00and right", presentation=shown, occurred_at=at))
    found = store.read(lambda connection: get(connection, row.id, author))
    assert found == row
    assert row.rationale == "short \ufffdand right"
    assert (row.inference_id, row.occurred_at, row.presentation, row.value) == (inference_id, at, shown, "up")
    assert (row.state, row.source, row.supersedes_id, row.first_id, row.api_key_id) == ("active", "api", None, row.id, author.api_key_id)


def test_the_same_key_of_the_same_author_says_it_once(store: Store) -> None:
    _, completion_id = one_answer(store)
    mine, other = a_key(store), a_key(store)
    thumb = a_thumb(completion_id, author=mine, idem_key="k")
    row = said(store, thumb)
    assert say(store, thumb, thumb) == [Accepted(row, False)] * 2
    assert refused(store, replace(thumb, value="down"))[0] == "idempotency_conflict"
    assert refused(store, replace(thumb, rationale="because"))[0] == "idempotency_conflict"
    others = [said(store, replace(thumb, author=author)) for author in (other, ANYONE, Author(mine.api_key_id, "5ub1ec7"))]
    assert len({row.id, *(each.id for each in others)}) == 4
    assert len({row.annotator_id, *(each.annotator_id for each in others)}) == 4
    assert [said(store, replace(thumb, author=ANYONE)).id for _ in range(3)] == [others[1].id] * 3
    assert count(store) == 4


def test_what_no_database_keeps_makes_no_other_key(store: Store) -> None:
    one_answer(store, episode_id="a\x00b")
    comment = a_thumb("a\x00b", target_type="episode", kind="comment", value="\x00", idem_key="k\x00")
    assert [type(each) for each in say(store, comment, comment)] == [Accepted, Accepted]
    assert said(store, comment).value == "\ufffd"
    assert count(store) == 1


def test_without_a_key_it_is_said_as_often_as_it_is_sent(store: Store) -> None:
    _, completion_id = one_answer(store)
    assert len({said(store, a_thumb(completion_id)).id for _ in range(3)}) == count(store) == 3


def test_in_one_transaction_the_same_is_said_once_and_the_wrong_ones_are_left_out(store: Store) -> None:
    _, completion_id = one_answer(store)
    first, again, other, wrong, last = say(
        store,
        a_thumb(completion_id, idem_key="a"),
        a_thumb(completion_id, idem_key="a"),
        a_thumb(completion_id, idem_key="a", value="down"),
        a_thumb("cmp-none", idem_key="b"),
        a_thumb(completion_id, idem_key="c"),
    )
    assert isinstance(first, Accepted)
    assert isinstance(last, Accepted)
    assert again == Accepted(first.feedback, False)
    assert isinstance(other, Refused)
    assert isinstance(wrong, Refused)
    assert (other.code, wrong.code) == ("idempotency_conflict", "not_found")
    assert count(store) == 2


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(posts=st.lists(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["up", "down"])), max_size=5), max_size=6))
def test_however_posts_are_repeated_and_grouped_there_is_one_row_and_one_id_a_key(store: Store, posts: list[list[tuple[str, str]]]) -> None:
    _, completion_id = one_answer(store)
    round = new_id("")
    first: dict[str, tuple[str, str]] = {}
    before = count(store)
    for group in posts:
        outcomes = say(store, *(a_thumb(completion_id, idem_key=f"{round}{key}", value=value) for key, value in group))
        for (key, value), outcome in zip(group, outcomes, strict=True):
            if key not in first:
                assert isinstance(outcome, Accepted)
                assert outcome.new
                first[key] = (value, outcome.feedback.id)
            elif first[key][0] == value:
                assert isinstance(outcome, Accepted)
                assert (outcome.new, outcome.feedback.id) == (False, first[key][1])
            else:
                assert isinstance(outcome, Refused)
                assert outcome.code == "idempotency_conflict"
    assert count(store) - before == len(first)


def test_threads_that_send_the_same_at_once_get_one_id(store: Store) -> None:
    _, completion_id = one_answer(store)
    ids: list[str] = []

    def send() -> None:
        for number in range(10):
            ids.append(said(store, a_thumb(completion_id, idem_key=str(number))).id)

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(ids), len(set(ids)), count(store)) == (80, 10, 10)


def test_a_target_must_be_there_and_be_what_it_is_said_to_be(store: Store) -> None:
    inference_id, completion_id = one_answer(store, episode_id="talk-1")
    _, _, group_id = answers(store, 2)
    ids = {"completion": completion_id, "inference": inference_id, "episode": "talk-1", "group": group_id}
    for what, (kind, id) in itertools.product(ids, ids.items()):
        comment = a_thumb(id, kind="comment", value="Hm.", target_type=what)
        if what == kind:
            assert said(store, comment).target_id == id
        else:
            assert refused(store, comment) == ("not_found", f"there is no {what} {id!r}")


def test_what_was_not_stored_or_is_not_any_more_cannot_be_judged(store: Store) -> None:
    inference_id, completion_id = one_answer(store)
    _, late = one_answer(store, retention_until=datetime.now(UTC) - timedelta(days=1))
    old = said(store, a_thumb(completion_id))
    store.write(lambda connection: delete(connection, inference_id)).result()
    for target in (completion_id, late, "cmp-unstored-0123"):
        assert refused(store, a_thumb(target))[0] == "not_stored"
    assert refused(store, a_thumb(inference_id, target_type="inference"))[0] == "not_stored"
    assert refused(store, a_thumb("chatcmpl-unstored-0123", target_type="inference"))[0] == "not_stored"
    revised = store.write(lambda connection: revise(connection, old.id, a_thumb("", value="down"))).result()
    assert isinstance(revised, Refused)
    assert revised.code == "not_stored"


def test_candidates_are_those_of_the_group_or_of_the_inference(store: Store) -> None:
    inference_id, mine, group_id = answers(store, 3)
    _, (stranger, *_), _ = answers(store, 2)
    for what, target in (("group", group_id), ("inference", inference_id)):
        pair = a_thumb(target, target_type=what, kind="preference", value={"a": mine[2], "b": mine[0], "choice": "tie"})
        assert said(store, pair).value == {"a": mine[2], "b": mine[0], "choice": "tie"}
        assert refused(store, replace(pair, value={"a": mine[0], "b": stranger, "choice": "a"})) == (
            "invalid_value",
            f"{stranger!r} is no completion of the {what} {target!r}; compared are completions of one {what}",
        )
        assert refused(store, a_thumb(target, target_type=what, kind="ranking", value=[[mine[0]], ["cmp-none"]]))[0] == "invalid_value"
    ranked = said(store, a_thumb(group_id, target_type="group", kind="ranking", value=[[mine[1]], [mine[0], mine[2]]]))
    places = select(rank_entry.c.completion_id, rank_entry.c.rank).where(rank_entry.c.feedback_id == ranked.id)
    assert dict(store.read(lambda connection: [tuple(row) for row in connection.execute(places)])) == {
        mine[1]: 1,
        mine[0]: 2,
        mine[2]: 2,
    }


def test_a_correction_corrects_something(store: Store) -> None:
    _, completion_id = one_answer(store)
    correction = a_thumb(completion_id, kind="correction", value="Light is scattered.")
    assert said(store, correction).value == "Light is scattered."
    assert refused(store, replace(correction, value=" Rayleigh scattering.\n"))[1].startswith("the correction is the same as the answer")


def a_metric(**values: Any) -> Metric:
    return Metric(**{"id": new_id("met-"), "name": "clear", "type": "likert", "level": "completion", "lo": 1.0, "hi": 5.0, **values})


def test_a_metric_has_versions_and_one_that_is_as_it_was_stays(store: Store) -> None:
    first, new = store.write(lambda connection: define(connection, a_metric())).result()
    same, again = store.write(lambda connection: define(connection, a_metric())).result()
    second, changed = store.write(lambda connection: define(connection, a_metric(hi=7.0, optimize="max"))).result()
    assert (new, again, changed) == (True, False, True)
    assert (first, first.version, second.version) == (same, 1, 2)
    assert store.read(lambda connection: get_metric(connection, "clear")) == second
    assert store.read(lambda connection: get_metric(connection, "clear", 1)) == first
    assert store.read(all_metrics) == [first, second]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hi": None}, "is likert and needs whole numbers for lo and hi, such as 1 and 7"),
        ({"hi": 4.5}, "needs whole numbers"),
        ({"hi": 1.0}, "has lo 1 and hi 1; lo is the smaller one"),
        ({"type": "bool"}, "is bool and has no lo and hi; leave them out"),
        ({"categories": ["a", "b"]}, "is likert and has no categories; leave them out"),
        ({"type": "categorical", "lo": None, "hi": None}, "is categorical and needs two or more categories that differ"),
        ({"type": "categorical", "lo": None, "hi": None, "categories": ["a", "a"]}, "needs two or more categories that differ"),
    ],
)
def test_a_metric_that_makes_no_sense(store: Store, values: dict[str, Any], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        store.write(lambda connection: define(connection, a_metric(**values))).result()


@pytest.mark.parametrize(
    ("values", "right", "wrong", "allowed"),
    [
        ({}, [1, 5], [0, 6, 2.5, True, "3", 1e300], "a whole number from 1 up to 5"),
        ({"type": "float", "hi": None}, [1, 1.0, 1e300], [0.999, True, "1"], "a number from 1"),
        ({"type": "bool", "lo": None, "hi": None}, [True, False], [1, 0.0, "true"], "true, false"),
        ({"type": "categorical", "lo": None, "hi": None, "categories": ["a", "b"]}, ["a", "b"], ["c", "", 1, True], "a, b"),
    ],
)
def test_values_of_a_metric_are_of_its_type_and_within_its_range(
    store: Store, values: dict[str, Any], right: list[Any], wrong: list[Any], allowed: str
) -> None:
    _, completion_id = one_answer(store)
    metric, _ = store.write(lambda connection: define(connection, a_metric(**values))).result()
    for value in right:
        row = said(store, a_thumb(completion_id, kind="metric", metric=("clear", None), value=value))
        found = store.read(lambda connection, id=row.id: get(connection, id, ANYONE))
        assert found is not None
        assert (found.metric_id, found.value, type(found.value) is bool) == (metric.id, value, metric.type == "bool")
    for value in wrong:
        code, message = refused(store, a_thumb(completion_id, kind="metric", metric=("clear", None), value=value))
        assert code == "invalid_value"
        assert message.endswith(f"is no value of the metric 'clear', version 1; allowed: {allowed}")


def test_a_metric_is_named_by_version_and_is_of_one_level(store: Store) -> None:
    inference_id, completion_id = one_answer(store)
    for hi in (5.0, 7.0):
        store.write(lambda connection, hi=hi: define(connection, a_metric(hi=hi))).result()
    seven = a_thumb(completion_id, kind="metric", metric=("clear", 2), value=7)
    row = said(store, seven)
    assert refused(store, replace(seven, metric=("clear", 1)))[0] == "invalid_value"
    assert refused(store, replace(seven, metric=("clear", 3)))[1].startswith("there is no metric 'clear in version 3'")
    assert refused(store, replace(seven, metric=("kind", None)))[0] == "not_found"
    wrong_level = replace(seven, target_type="inference", target_id=inference_id)
    assert refused(store, wrong_level)[1] == "the metric 'clear' is of a completion, and the target is a inference"
    store.write(lambda connection: define(connection, a_metric(hi=9.0))).result()
    revised = store.write(lambda connection: revise(connection, row.id, replace(seven, metric=None, value=8))).result()
    assert isinstance(revised, Refused)  # It was said of version 2, and stays with it.


def test_what_supersedes_makes_a_chain_and_nothing_in_it_changes(store: Store) -> None:
    _, completion_id = one_answer(store)
    chain = [said(store, a_thumb(completion_id))]
    for value in ("down", "up", "down"):
        outcome = store.write(lambda connection, value=value: revise(connection, chain[-1].id, a_thumb("", value=value))).result()
        assert isinstance(outcome, Accepted)
        assert outcome.feedback.target_id == completion_id
        chain.append(outcome.feedback)
    for row in chain:
        found = store.read(lambda connection, row=row: history(connection, row.first_id))
        assert [(each.id, each.value) for each in found] == [(each.id, each.value) for each in chain]
    assert [each.state for each in found] == ["superseded"] * 3 + ["active"]
    assert [each.supersedes_id for each in found] == [None, *(each.id for each in chain[:3])]
    late = store.write(lambda connection: revise(connection, chain[1].id, a_thumb(""))).result()
    assert late == Refused("superseded", f"feedback {chain[1].id!r} was superseded; the newest is {chain[3].id!r}", "id")
    gone = store.write(lambda connection: retract(connection, chain[3].id, ANYONE)).result()
    assert isinstance(gone, Feedback)
    assert store.write(lambda connection: retract(connection, chain[3].id, ANYONE)).result() == gone
    assert gone.state == "retracted"
    assert count(store) == 4
    stays = store.write(lambda connection: revise(connection, chain[3].id, a_thumb(""))).result()
    assert isinstance(stays, Refused)
    assert "is retracted and stays as it is" in stays.message


def test_a_revision_is_sent_again_without_harm(store: Store) -> None:
    _, completion_id = one_answer(store)
    first = said(store, a_thumb(completion_id, idem_key="1"))
    down = a_thumb("", value="down", idem_key="2")
    outcomes = [store.write(lambda connection: revise(connection, first.id, down)).result() for _ in range(3)]
    assert [each.new for each in outcomes if isinstance(each, Accepted)] == [True, False, False]
    assert len({each.feedback.id for each in outcomes if isinstance(each, Accepted)}) == 1
    other = store.write(lambda connection: revise(connection, first.id, replace(down, value="up"))).result()
    assert isinstance(other, Refused)
    assert other.code == "idempotency_conflict"
    assert say(store, a_thumb(completion_id, idem_key="1"))[0] == Accepted(replace(first, state="superseded"), False)


def test_of_two_who_revise_at_once_one_is_told_of_the_other(store: Store) -> None:
    _, completion_id = one_answer(store)
    first = said(store, a_thumb(completion_id))
    futures = [store.write(lambda connection: revise(connection, first.id, a_thumb("", value="down"))) for _ in range(8)]
    outcomes = [future.result() for future in futures]
    assert sorted(type(each).__name__ for each in outcomes) == ["Accepted"] + ["Refused"] * 7


def test_one_cannot_see_revise_or_retract_what_another_said(store: Store) -> None:
    inference_id, completion_id = one_answer(store)
    mine, other = a_key(store), a_key(store)
    row = said(store, a_thumb(completion_id, author=mine))
    for author, within in ((other, None), (ANYONE, None), (Author(mine.api_key_id, "5ub1ec7"), None), (mine, "chatcmpl-other")):
        assert store.read(lambda connection, a=author, w=within: get(connection, row.id, a, w)) is None
        assert store.read(lambda connection, a=author, w=within: listed(connection, a, within=w)) == ([], False)
        down = a_thumb("", author=author, within=within, value="down")
        for outcome in (
            store.write(lambda connection, down=down: revise(connection, row.id, down)).result(),
            store.write(lambda connection, a=author, w=within: retract(connection, row.id, a, w)).result(),
        ):
            assert outcome == Refused("not_found", f"there is no feedback {row.id!r} of this author", "id")
    assert store.read(lambda connection: get(connection, row.id, mine, inference_id)) == row
    assert store.read(lambda connection: get(connection, row.id, other, every=True)) == row


def test_who_may_speak_of_one_inference_may_speak_of_no_other(store: Store) -> None:
    inference_id, completion_id = one_answer(store, episode_id="talk-1")
    _, another = one_answer(store)
    assert said(store, a_thumb(completion_id, within=inference_id)).inference_id == inference_id
    assert said(store, a_thumb(inference_id, target_type="inference", within=inference_id)).inference_id == inference_id
    assert refused(store, a_thumb(another, within=inference_id))[0] == "not_found"
    assert refused(store, a_thumb("talk-1", target_type="episode", within=inference_id))[0] == "not_found"


def test_listing_goes_on_where_it_stopped(store: Store) -> None:
    _, completion_id = one_answer(store)
    _, another = one_answer(store)
    rows = [said(store, a_thumb(target)).id for target in (completion_id, another) * 3]
    store.write(lambda connection: retract(connection, rows[0], ANYONE)).result()

    def ids(**values: Any) -> tuple[list[str], bool]:
        found, more = store.read(lambda connection: listed(connection, ANYONE, **values))
        return [row.id for row in found], more

    assert ids(limit=4) == (rows[:4], True)
    assert ids(limit=4, after=rows[3]) == (rows[4:], False)
    assert ids(limit=2, order="desc", after=rows[5]) == ([rows[4], rows[3]], True)
    assert ids(target=another) == (rows[1::2], False)
    assert ids(state="retracted") == (rows[:1], False)
    assert ids(kind="rating") == ([], False)


def test_a_key_may_be_given_to_somebody_who_is_known_already(store: Store) -> None:
    _, completion_id = one_answer(store)
    one, other = a_key(store), a_key(store)
    row = said(store, a_thumb(completion_id, author=one))
    same = update(api_key).where(api_key.c.id == other.api_key_id).values(annotator_id=row.annotator_id)
    store.write(lambda connection: connection.execute(same)).result()
    assert said(store, a_thumb(completion_id, author=other)).annotator_id == row.annotator_id
    assert store.read(lambda connection: annotators.known(connection, one)) == store.read(
        lambda connection: annotators.known(connection, other)
    )


def test_of_one_who_is_blocked_nothing_is_taken(store: Store) -> None:
    _, completion_id = one_answer(store)
    row = said(store, a_thumb(completion_id))
    store.write(lambda connection: connection.execute(update(annotator).values(status="blocked"))).result()
    assert refused(store, a_thumb(completion_id))[0] == "annotator_blocked"
    outcome = store.write(lambda connection: revise(connection, row.id, a_thumb("", value="down"))).result()
    assert isinstance(outcome, Refused)
    assert outcome.code == "annotator_blocked"


def test_who_judges_is_stored_as_a_hash(store: Store) -> None:
    author = a_key(store)
    found = store.write(lambda connection: annotators.of(connection, author)).result()
    assert author.api_key_id not in found.subject_hmac
    assert len(found.subject_hmac) == 64
    assert (found.kind, found.status, found.weight) == ("expert", "probation", 1.0)
    assert store.write(lambda connection: annotators.of(connection, author)).result() == found


def test_a_database_of_the_first_revision_keeps_what_it_has(database_url: str) -> None:
    config = Config()
    config.set_main_option("script_location", "alignkit_serve.store:migrations")
    engine = database.writing(database.parse(database_url))
    record = "INSERT INTO api_key VALUES ('key-1', 'p', 's', 'n', '[\"infer\"]', NULL, NULL, 'me', :at, NULL, NULL, NULL)"
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(text(record), {"at": "2026-01-01 00:00:00"})
    engine.dispose()
    with Store.open(database_url) as store:
        assert [each.id for each in store.read(keys.listed)] == ["key-1"]
        _, completion_id = one_answer(store, api_key_id="key-1")
        assert said(store, a_thumb(completion_id, author=Author("key-1"))).api_key_id == "key-1"
        assert store.read(lambda connection: connection.scalar(select(func.count()).select_from(inference))) == 1


def test_nothing_that_is_asked_to_add_feedback_reads_a_whole_table(tmp_path: Path) -> None:
    asked: list[tuple[str, Any]] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if statement.startswith("SELECT"):
            asked.append((statement, parameters))

    with Store.open(f"sqlite:///{tmp_path / 'store.db'}") as store:
        inference_id, (one, other), group_id = answers(store, 2)
        event.listen(Engine, "before_cursor_execute", note)
        pair = {"a": one, "b": other, "choice": "a"}
        say(
            store,
            a_thumb(one, idem_key="a"),
            a_thumb(other, kind="correction", value="No.", idem_key="b"),
            a_thumb("talk", kind="comment", target_type="episode", value="Hm."),
            a_thumb(group_id, kind="preference", target_type="group", value=pair),
            a_thumb(inference_id, kind="preference", target_type="inference", value=pair, author=a_key(store)),
        )
        event.remove(Engine, "before_cursor_execute", note)
    with sqlite3.connect(tmp_path / "store.db") as connection:
        plans = [row[3] for query, values in asked for row in connection.execute(f"EXPLAIN QUERY PLAN {query}", values)]
    assert len(asked) >= 9
    assert [plan for plan in plans if plan.startswith("SCAN") and "CONSTANT ROW" not in plan] == []
