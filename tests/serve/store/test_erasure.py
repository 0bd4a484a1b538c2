"""Erasure: of what somebody said no word is left in any table, and everything that learnt from it can be named."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select

from alignkit_serve.store import Store, StoreError, annotators, audit, inferences, labels, new_id, rounds
from alignkit_serve.store.annotators import END_USERS, Author, end_user
from alignkit_serve.store.erasure import ABOUT, OWN, Erasure, UnknownSubject, delete_inference, erase
from alignkit_serve.store.feedback import Accepted, Feedback, Refused, add, revise
from alignkit_serve.store.groups import Group, add_group
from alignkit_serve.store.policies import PolicyVersion
from alignkit_serve.store.secrets import secret
from alignkit_serve.store.tables import assignment, completion, erasure, export, feedback, inference, label_task, metadata
from tests.serve.store.rows import a_completion, a_round, an_export, an_inference, stored_policy
from tests.serve.store.test_feedback import a_key, a_thumb, said

NOTHING = {"inferences": 0, "completions": 0, "feedback": 0, "exports": 0, "tasks": 0, "running": 0}


def hashed(store: Store, user: str) -> str:
    return store.write(lambda connection: end_user(secret(connection, END_USERS), user)).result()


def conversation(store: Store, user: str | None, words: str, *, policy: PolicyVersion | None = None, **values: Any) -> tuple[str, str]:
    """The ids of an inference in which ``words`` were asked and answered, and of its completion."""
    policy = policy or stored_policy(store)
    subject = None if user is None else hashed(store, user)
    messages = [{"role": "user", "content": f"{words}?"}]
    asked = an_inference(policy, messages=messages, end_user_hmac=subject, metadata={"tag": words}, **values)
    answer = a_completion(asked, text=f"{words}!")

    def write(connection: Any) -> None:
        inferences.begin(connection, asked)
        inferences.finish(connection, asked.id, [answer], status="done", prompt_tokens=1, completion_tokens=1)

    store.write(write).result()
    return asked.id, answer.id


def a_group(store: Store, *completion_ids: str) -> str:
    group = Group(new_id("grp-"), "9a", "label_pool", None, None, tuple((id, slot) for slot, id in enumerate(completion_ids)))
    store.write(lambda connection: add_group(connection, group)).result()
    return group.id


def erased(store: Store, name: str) -> Erasure:
    return store.write(lambda connection: erase(connection, name, "key ABC")).result()


def everything(store: Store) -> str:
    """All that is in the database."""
    return store.read(lambda connection: repr([list(connection.execute(select(table))) for table in metadata.tables.values()]))


def row(store: Store, id: str) -> Any:
    return store.read(lambda connection: connection.execute(select(feedback).where(feedback.c.id == id)).one())


def states(store: Store, *given: Feedback) -> list[str]:
    return [row(store, each.id).state for each in given]


def test_no_word_of_an_end_user_is_left_and_every_word_of_others_is(store: Store) -> None:
    policy = stored_policy(store)
    mine, my_answer = conversation(store, "jane", "JANES", policy=policy, episode_id="talk-1")
    theirs, their_answer = conversation(store, "joe", "JOES", policy=policy, episode_id="talk-1")
    group = a_group(store, my_answer, their_answer)
    alone = a_group(store, their_answer)
    jane, judge = Author(None, hashed(store, "jane")), a_key(store)
    other = a_thumb(their_answer, author=judge, rationale="JOES friend")
    told = [
        said(store, each)
        for each in (
            a_thumb(my_answer, author=jane, rationale="JANES reason", presentation={"ui_version": "JANES"}),
            a_thumb(their_answer, author=jane, kind="correction", value="JANES version"),
            a_thumb(their_answer, author=jane, kind="rating", value=2),
            a_thumb(my_answer, author=judge, kind="correction", value="JANES answer, corrected"),
            a_thumb(mine, author=judge, kind="demonstration", target_type="inference", value="as JANES should be"),
            a_thumb("talk-1", author=judge, kind="comment", target_type="episode", value="JANES talk"),
            a_thumb(group, author=judge, kind="ranking", target_type="group", value=[[my_answer], [their_answer]]),
            a_thumb(my_answer, author=judge, value="down"),
        )
    ]
    kept = [
        said(store, other),
        said(store, a_thumb("talk-1", author=judge, target_type="episode")),
        said(store, a_thumb(alone, author=judge, kind="comment", target_type="group", value="JOES group")),
    ]
    done = erased(store, "jane")
    assert done.counts == {**NOTHING, "inferences": 1, "completions": 1, "feedback": 8}
    left = everything(store)
    assert "JANES" not in left
    assert hashed(store, "jane") not in repr(store.read(lambda connection: list(connection.execute(select(inference)))))
    assert left.count("JOES") == 5
    assert states(store, *told) == ["erased"] * 8
    assert states(store, *kept) == ["active"] * 3
    assert [row(store, each.id).reason for each in told] == [OWN] * 3 + [ABOUT] * 5
    # What holds no text stays, for whoever wants to know what was learnt: a rating, a ranking of ids.
    assert [row(store, each.id).value for each in (told[1], told[2], told[6])] == ["", 2, [[my_answer], [their_answer]]]
    answered = store.read(lambda connection: connection.execute(select(completion).where(completion.c.id == my_answer)).one())
    assert (answered.text, answered.token_ids, answered.raw_logprobs, answered.behaviour_logprobs) == ("", (), None, None)
    asked = store.read(lambda connection: connection.execute(select(inference).where(inference.c.id == mine)).one())
    assert (asked.messages, asked.prompt_sha256, asked.metadata, asked.redaction) == ([], "", {}, "erased")
    assert store.read(lambda connection: inferences.get(connection, theirs)) is not None


def test_again_it_erases_nothing_more_and_tells_the_same(store: Store) -> None:
    _, answer = conversation(store, "jane", "JANES")
    one = said(store, a_thumb(answer, author=a_key(store)))
    parent, child, grandchild = stored_policy(store), stored_policy(store), stored_policy(store)
    data, elsewhere = an_export(store, [one.id]), an_export(store)
    made, after = a_round(parent, child, data), a_round(child, grandchild, elsewhere, name="round-2")
    for each in (made, after):
        store.write(lambda connection, each=each: rounds.add(connection, each)).result()
    first, second = erased(store, "jane"), erased(store, "jane")
    assert (first.counts["inferences"], first.counts["feedback"], first.counts["exports"]) == (1, 1, 1)
    assert second.counts == NOTHING
    assert second.id != first.id
    for done in (first, second):
        assert [each.id for each in done.reach.exports] == [data.id]
        assert [each.id for each in done.reach.rounds] == [made.id]
        assert [each.id for each in done.reach.policies] == [child.id, grandchild.id]
        assert done.reach.exports[0].tainted_at == first.requested_at
    noted = store.read(lambda connection: connection.execute(select(erasure).order_by(erasure.c.id)).all())
    assert [(each.id, each.counts, each.rounds["rounds"]) for each in noted] == [
        (first.id, first.counts, [made.id]),
        (second.id, second.counts, [made.id]),
    ]
    entry = store.read(lambda connection: audit.latest(connection, "erasure"))
    assert entry is not None
    assert (entry.object, entry.actor, entry.detail["policies"]) == (second.id, "key ABC", [child.id, grandchild.id])
    assert store.read(audit.verify) is None
    late = a_round(parent, stored_policy(store), data)
    with pytest.raises(StoreError, match="holds what was erased"):
        store.write(lambda connection: rounds.add(connection, late)).result()


def test_somebody_of_whom_nothing_is_known_is_erased_without_effect(store: Store) -> None:
    conversation(store, "joe", "JOES")
    before = everything(store).count("JOES")
    assert erased(store, "nobody").counts == NOTHING
    assert everything(store).count("JOES") == before
    with pytest.raises(UnknownSubject, match=r"no annotator 'ann-0{32}'"):
        erased(store, "ann-" + "0" * 32)
    # Nothing is noted of what was refused; a name that only looks alike is a name.
    assert erased(store, "ann-jane").counts == NOTHING
    assert len(store.read(lambda connection: connection.execute(select(erasure)).all())) == 2


def test_an_annotator_is_erased_by_id_and_what_they_judged_stays(store: Store) -> None:
    policy = stored_policy(store)
    asked, answer = conversation(store, "joe", "JOES", policy=policy)
    _, second = conversation(store, None, "TEXT", policy=policy)
    expert = a_key(store)
    group = a_group(store, answer, second)
    task = store.write(lambda connection: labels.add_task(connection, group, overlap=2)).result()
    now = datetime.now(UTC)
    given = store.write(lambda connection: labels.next_assignment(connection, expert, now)).result()
    assert given is not None
    store.write(lambda connection: labels.save_draft(connection, given.id, expert, {"comment": "EXPERTS"}, now)).result()
    one = said(store, a_thumb(answer, author=expert, rationale="EXPERTS"))
    done = erased(store, one.annotator_id)
    assert done.counts == {**NOTHING, "feedback": 1}
    left = everything(store)
    assert "EXPERTS" not in left
    assert left.count("JOES") == 3
    assert states(store, one) == ["erased"]
    assert store.read(lambda connection: inferences.get(connection, asked)) is not None
    found = store.read(lambda connection: labels.get_task(connection, task.id))
    assert found is not None
    assert found.state == "open"
    assert erased(store, one.annotator_id).counts == NOTHING
    # An end user's id as an annotator stands for the same person as their name.
    jane = said(store, a_thumb(answer, author=Author(None, hashed(store, "jane"))))
    conversation(store, "jane", "JANES", policy=policy)
    assert erased(store, jane.annotator_id).counts == {**NOTHING, "inferences": 1, "completions": 1, "feedback": 1}
    assert "JANES" not in everything(store)


def test_tasks_on_what_is_gone_are_withdrawn_with_their_drafts(store: Store) -> None:
    policy = stored_policy(store)
    _, mine = conversation(store, "jane", "JANES", policy=policy)
    _, other = conversation(store, None, "TEXT", policy=policy)
    task = store.write(lambda connection: labels.add_task(connection, a_group_in(connection, mine, other), overlap=1)).result()
    expert, now = a_key(store), datetime.now(UTC)
    given = store.write(lambda connection: labels.next_assignment(connection, expert, now)).result()
    assert given is not None
    store.write(lambda connection: labels.save_draft(connection, given.id, expert, {"comment": "on JANES"}, now)).result()
    assert erased(store, "jane").counts == {**NOTHING, "inferences": 1, "completions": 1, "tasks": 1}
    assert "JANES" not in everything(store)
    assert store.read(lambda connection: connection.scalar(select(label_task.c.state).where(label_task.c.id == task.id))) == "withdrawn"
    assert store.read(lambda connection: connection.scalar(select(assignment.c.draft))) is None
    assert store.write(lambda connection: labels.next_assignment(connection, expert, now)).result() is None


def a_group_in(connection: Any, *completion_ids: str) -> str:
    group = Group(new_id("grp-"), "9a", "label_pool", None, None, tuple((id, slot) for slot, id in enumerate(completion_ids)))
    add_group(connection, group)
    return group.id


def test_an_answer_in_progress_is_counted_and_goes_the_next_time(store: Store) -> None:
    asked = an_inference(stored_policy(store), messages=[{"role": "user", "content": "JANES"}], end_user_hmac=hashed(store, "jane"))
    store.write(lambda connection: inferences.begin(connection, asked)).result()
    assert erased(store, "jane").counts == {**NOTHING, "running": 1}
    store.write(
        lambda connection: inferences.finish(
            connection, asked.id, [a_completion(asked)], status="done", prompt_tokens=1, completion_tokens=1
        )
    ).result()
    assert erased(store, "jane").counts == {**NOTHING, "inferences": 1, "completions": 1}
    assert "JANES" not in everything(store)


def test_what_is_erased_does_not_come_back_with_a_late_repetition(store: Store) -> None:
    _, answer = conversation(store, "joe", "JOES")
    opinion = a_thumb(answer, author=Author(None, hashed(store, "jane")), idem_key="k", rationale="JANES")
    said(store, opinion)
    erased(store, "jane")
    (again,) = store.write(lambda connection: add(connection, [opinion])).result()
    assert isinstance(again, Refused)
    assert again.code == "idempotency_conflict"
    assert "JANES" not in everything(store)


def test_opinions_that_superseded_one_another_go_together(store: Store) -> None:
    _, answer = conversation(store, "joe", "JOES")
    jane, admin = Author(None, hashed(store, "jane")), a_key(store)
    first = said(store, a_thumb(answer, author=jane, kind="comment", value="JANES"))
    second = a_thumb(answer, author=admin, kind="comment", value="JANES, as an admin put it")
    newest = store.write(lambda connection: revise(connection, first.id, second, every=True)).result()
    assert isinstance(newest, Accepted)
    assert erased(store, "jane").counts == {**NOTHING, "feedback": 2}
    assert "JANES" not in everything(store)
    for each in (first.id, newest.feedback.id):
        late = store.write(lambda connection, id=each: revise(connection, id, second, every=True)).result()
        assert isinstance(late, Refused)
        assert late.message == f"feedback {each!r} is erased and stays as it is; say it anew"


def test_one_conversation_that_its_owner_deletes_goes_with_what_was_said_of_it(store: Store) -> None:
    mine, answer = conversation(store, None, "MINE")
    other, _ = conversation(store, None, "OTHER")
    one = said(store, a_thumb(answer, author=a_key(store), kind="correction", value="MINE, corrected"))
    data, untouched = an_export(store, [one.id]), an_export(store)
    assert not store.write(lambda connection: delete_inference(connection, mine, "key A", api_key_id="key-other")).result()
    assert store.write(lambda connection: delete_inference(connection, mine, "key A")).result()
    assert not store.write(lambda connection: delete_inference(connection, mine, "key A")).result()
    assert "MINE" not in everything(store)
    assert states(store, one) == ["erased"]
    exports = store.read(lambda connection: connection.execute(select(export.c.id, export.c.tainted_at)).all())
    tainted = {id: at for id, at in exports}
    assert tainted[data.id] is not None
    assert tainted[untouched.id] is None
    entry = store.read(lambda connection: audit.latest(connection, "export.taint"))
    assert entry is not None
    assert (entry.actor, entry.object, entry.detail) == ("key A", mine, {"exports": [data.id]})
    assert store.read(lambda connection: inferences.get(connection, other)) is not None


def test_exports_of_all_prompts_are_tainted_by_prompts_that_nobody_judged(store: Store) -> None:
    mine, _ = conversation(store, None, "MINE")
    silent, _ = conversation(store, None, "SILENT", consent_train=False)
    every, judged = an_export(store, shape="prompts", filters={"of": "all"}), an_export(store, shape="prompts", filters={"of": "judged"})
    before = an_export(store, shape="prompts", filters={"of": "all"}, created_at=datetime.now(UTC) - timedelta(days=1))

    def tainted() -> set[str]:
        found = select(export.c.id).where(export.c.tainted_at.is_not(None))
        return set(store.read(lambda connection: connection.scalars(found).all()))

    store.write(lambda connection: delete_inference(connection, silent, "key A")).result()
    assert tainted() == set()
    store.write(lambda connection: delete_inference(connection, mine, "key A")).result()
    assert tainted() == {every.id}
    assert {judged.id, before.id}.isdisjoint(tainted())


def test_all_of_it_or_nothing(store: Store) -> None:
    _, answer = conversation(store, "jane", "JANES")
    said(store, a_thumb(answer, author=a_key(store), rationale="JANES"))
    before = everything(store)

    def work(connection: Any) -> None:
        erase(connection, "jane", "key ABC")
        raise StoreError("the disk is full")

    with pytest.raises(StoreError, match="the disk is full"):
        store.write(work).result()
    assert everything(store) == before


def test_many_conversations_go_in_one_transaction(store: Store) -> None:
    policy, subject, key = stored_policy(store), hashed(store, "jane"), a_key(store)
    count = 501

    def write(connection: Any) -> None:
        opinions = []
        for number in range(count):
            asked = an_inference(policy, messages=[{"role": "user", "content": f"JANES {number}"}], end_user_hmac=subject)
            answer = a_completion(asked, text=f"JANES {number}")
            inferences.begin(connection, asked)
            inferences.finish(connection, asked.id, [answer], status="done", prompt_tokens=1, completion_tokens=1)
            opinions.append(a_thumb(answer.id, author=key, rationale="JANES"))
        assert all(isinstance(each, Accepted) for each in add(connection, opinions))

    store.write(write).result()
    done = erased(store, "jane")
    assert (done.counts["inferences"], done.counts["completions"], done.counts["feedback"]) == (count, count, count)
    assert "JANES" not in everything(store)


def test_who_is_erased_keeps_an_id_and_may_judge_again(store: Store) -> None:
    _, answer = conversation(store, "joe", "JOES")
    jane = Author(None, hashed(store, "jane"))
    one = said(store, a_thumb(answer, author=jane))
    erased(store, "jane")
    again = said(store, a_thumb(answer, author=jane))
    assert (again.annotator_id, again.state) == (one.annotator_id, "active")
    known = store.read(lambda connection: annotators.known(connection, jane))
    assert known is not None
    assert known.id == one.annotator_id
