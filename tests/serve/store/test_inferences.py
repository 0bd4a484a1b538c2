"""Inferences: what goes in comes out, to the right key, until it is erased."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import select

from alignkit_serve.store import Store, StoreError
from alignkit_serve.store.inferences import Ending, begin, delete, finish, get, listed, prompt_sha256, set_metadata, sweep
from alignkit_serve.store.keys import create
from alignkit_serve.store.tables import completion as completions
from alignkit_serve.store.tables import inference as inferences
from tests.serve.store.rows import a_completion, a_policy, an_inference, answered, stored_policy


def a_key(store: Store) -> str:
    record, _ = store.write(lambda connection: create(connection, "a", ["infer"], created_by="test")).result()
    return record.id


def ids(store: Store, **filters: Any) -> tuple[list[str], bool]:
    found, more = store.read(lambda connection: listed(connection, **filters))
    return [each.inference.id for each in found], more


def test_an_inference_is_running_then_done_and_comes_back_as_it_was(store: Store) -> None:
    policy, key = stored_policy(store), a_key(store)
    east = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    asked = an_inference(
        policy,
        api_key_id=key,
        episode_id="ep-1",
        end_user_hmac="ab12",
        messages=[{"role": "system", "content": "Kurz."}, {"role": "user", "content": "Grüße 🌅 \x01"}],
        params={"temperature": 0.0, "stop": ["\n", "ü"], "logit_bias": {"50256": -100}, "top_p": None},
        metadata={"chat": 'a "quoted" one'},
        seed=-(2**63),
        consent_version="2026-01",
        created_at=east,
        retention_until=east + timedelta(days=30),
    )
    store.write(lambda connection: begin(connection, asked)).result()
    running = store.read(lambda connection: get(connection, asked.id))
    assert running is not None
    assert (running.inference, running.completions, running.status, running.redaction) == (asked, (), "running", "none")
    assert (running.prompt_tokens, running.completion_tokens, running.finished_at) == (None, None, None)
    assert running.inference.created_at.isoformat() == "2026-03-01T06:30:00.123456+00:00"

    first = a_completion(asked, 0, policy_spans=[{"version": policy.id, "from_token": 0}])
    second = a_completion(asked, 1, text="", token_ids=(), raw_logprobs=None, behaviour_logprobs=(), finish_reason="length")
    before = datetime.now(UTC)
    store.write(
        lambda connection: finish(connection, asked.id, [second, first], status="done", prompt_tokens=11, completion_tokens=3)
    ).result()
    done = store.read(lambda connection: get(connection, asked.id))
    assert done is not None
    assert (done.inference, done.completions, done.status) == (asked, (first, second), "done")
    assert (done.prompt_tokens, done.completion_tokens) == (11, 3)
    assert done.finished_at is not None
    assert before <= done.finished_at <= datetime.now(UTC)


def test_the_hash_of_a_prompt_knows_equal_prompts_whatever_the_order_of_their_keys() -> None:
    # printf '[{"content":"Grüße","role":"user"}]' | sha256sum
    expected = "0b6db099fdee2211017d5bfdf2ed7b5d53e8a5ae65d5b04078199e7ccb5332e8"
    assert prompt_sha256([{"role": "user", "content": "Grüße"}]) == expected
    assert prompt_sha256(({"content": "Grüße", "role": "user"},)) == expected
    assert prompt_sha256([{"role": "user", "content": "Grusse"}]) != expected


@pytest.mark.parametrize("status", ["done", "error", "cancelled"])
def test_only_a_running_inference_can_be_finished_and_only_once(store: Store, status: Ending) -> None:
    asked = an_inference(stored_policy(store))

    def end(idx: int) -> None:
        answers = [a_completion(asked, idx)]
        store.write(lambda connection: finish(connection, asked.id, answers, status=status, prompt_tokens=1, completion_tokens=3)).result()

    with pytest.raises(StoreError, match=f"inference '{asked.id}' is not running, and only a running one can be finished"):
        end(0)
    store.write(lambda connection: begin(connection, asked)).result()
    end(0)
    with pytest.raises(StoreError, match="is not running"):
        end(1)
    found = store.read(lambda connection: get(connection, asked.id))
    assert found is not None
    assert (found.status, len(found.completions)) == (status, 1)


def test_what_a_dead_server_left_running_is_aborted_at_the_next_start(store: Store) -> None:
    policy = stored_policy(store)
    done, _ = answered(store, policy)
    orphans = [an_inference(policy), an_inference(policy)]
    for orphan in orphans:
        store.write(lambda connection, orphan=orphan: begin(connection, orphan)).result()
    assert store.write(sweep).result() == 2
    assert store.write(sweep).result() == 0
    after = [store.read(lambda connection, each=each: get(connection, each.id)) for each in (done, *orphans)]
    assert [each.status for each in after if each] == ["done", "aborted", "aborted"]
    assert all(each.finished_at for each in after if each)


def test_a_key_sees_its_own_and_no_other(store: Store) -> None:
    policy, mine, other = stored_policy(store), a_key(store), a_key(store)
    own, _ = answered(store, policy, api_key_id=mine)
    strange, _ = answered(store, policy, api_key_id=other)
    nobody, _ = answered(store, policy)
    for each in (strange, nobody):
        assert store.read(lambda connection, each=each: get(connection, each.id, api_key_id=mine)) is None
        assert not store.write(lambda connection, each=each: set_metadata(connection, each.id, {"a": "b"}, api_key_id=mine)).result()
        assert not store.write(lambda connection, each=each: delete(connection, each.id, api_key_id=mine)).result()
        found = store.read(lambda connection, each=each: get(connection, each.id))
        assert found is not None
        assert (found.inference, found.completions[0].text) == (each, "Rayleigh scattering.")
    assert ids(store, api_key_id=mine) == ([own.id], False)
    assert ids(store) == ([own.id, strange.id, nobody.id], False)


def test_the_listing_pages_through_in_both_directions(store: Store) -> None:
    policy = stored_policy(store)
    made = [answered(store, policy)[0].id for _ in range(5)]
    assert ids(store, limit=2) == (made[:2], True)
    assert ids(store, limit=2, after=made[1]) == (made[2:4], True)
    assert ids(store, limit=2, after=made[3]) == (made[4:], False)
    assert ids(store, limit=5) == (made, False)
    assert ids(store, limit=3, order="desc") == (made[:1:-1], True)
    assert ids(store, limit=3, order="desc", after=made[2]) == (made[1::-1], False)
    assert ids(store, after=made[4]) == ([], False)


def test_the_listing_has_answered_chats_only_with_their_completions(store: Store) -> None:
    policy = stored_policy(store)
    chat, answer = answered(store, policy)
    answered(store, policy, endpoint="completions", messages=[{"role": "prompt", "content": "Once"}])
    running, failed = an_inference(policy), an_inference(policy)
    for each in (running, failed):
        store.write(lambda connection, each=each: begin(connection, each)).result()
    store.write(lambda connection: finish(connection, failed.id, [], status="error", prompt_tokens=1, completion_tokens=0)).result()
    found, more = store.read(listed)
    assert [(each.inference, each.completions) for each in found] == [(chat, (answer,))]
    assert not more


HARD = {'a"b': 'x"y', "a.b": "1", "$": "[0]", "ü\n\\": "ß\t'%", "": ""}


def test_the_listing_is_filtered_by_model_and_by_items_of_metadata(store: Store) -> None:
    policy = stored_policy(store)
    hard, _ = answered(store, policy, metadata=HARD)
    small, _ = answered(store, policy, metadata={"a.b": "1", "other": "2"}, model="small")
    assert ids(store, model="small") == ([small.id], False)
    assert ids(store, model="none") == ([], False)
    for key, value in HARD.items():
        expected = [hard.id, small.id] if key == "a.b" else [hard.id]
        assert ids(store, metadata={key: value}) == (expected, False), key
        assert ids(store, metadata={key: value + "?"}) == ([], False), key
    assert ids(store, metadata=HARD) == ([hard.id], False)
    assert ids(store, metadata={"a.b": "1", "other": "2"}) == ([small.id], False)
    assert ids(store, metadata={"a.b": "1"}, model="small") == ([small.id], False)
    assert ids(store, metadata={}) == ([hard.id, small.id], False)


def test_metadata_is_replaced_as_a_whole(store: Store) -> None:
    inference, completion = answered(store, stored_policy(store), metadata={"a": "1", "b": "2"})
    assert store.write(lambda connection: set_metadata(connection, inference.id, {"b": "3"})).result()
    found = store.read(lambda connection: get(connection, inference.id))
    assert found is not None
    assert (found.inference, found.completions) == (replace(inference, metadata={"b": "3"}), (completion,))
    assert ids(store, metadata={"b": "3"}) == ([inference.id], False)
    assert not store.write(lambda connection: set_metadata(connection, "chatcmpl-none", {"b": "3"})).result()


def test_what_is_deleted_leaves_a_row_that_says_nothing(store: Store) -> None:
    policy = stored_policy(store)
    secret = {"messages": [{"role": "user", "content": "my secret"}], "params": {"stop": ["my secret"]}, "metadata": {"k": "my secret"}}
    inference, completion = answered(store, policy, end_user_hmac="my secret", **secret)
    other, _ = answered(store, policy)
    assert store.write(lambda connection: delete(connection, inference.id)).result()
    assert store.read(lambda connection: get(connection, inference.id)) is None
    assert ids(store) == ([other.id], False)
    assert not store.write(lambda connection: set_metadata(connection, inference.id, {"k": "v"})).result()
    assert not store.write(lambda connection: delete(connection, inference.id)).result()
    row = store.read(lambda connection: connection.execute(select(inferences).where(inferences.c.id == inference.id)).one())
    said = store.read(lambda connection: connection.execute(select(completions).where(completions.c.id == completion.id)).one())
    assert "secret" not in repr((row, said))
    assert "Rayleigh" not in repr(said)
    assert (row.redaction, row.messages, row.params, row.metadata, row.end_user_hmac) == ("erased", [], {}, {}, None)
    assert (said.text, said.token_ids, said.raw_logprobs, said.behaviour_logprobs) == ("", (), None, None)
    assert (row.status, row.prompt_tokens, row.policy_version_id, said.finish_reason) == ("done", 9, policy.id, "stop")


def test_what_is_running_is_not_deleted_yet(store: Store) -> None:
    asked = an_inference(stored_policy(store))
    store.write(lambda connection: begin(connection, asked)).result()
    assert not store.write(lambda connection: delete(connection, asked.id)).result()
    found = store.read(lambda connection: get(connection, asked.id))
    assert found is not None
    assert found.inference == asked


def test_an_inference_of_a_policy_that_is_not_registered_is_refused(store: Store) -> None:
    with pytest.raises(Exception, match=r"(?i)foreign key"):
        store.write(lambda connection: begin(connection, an_inference(a_policy()))).result()
