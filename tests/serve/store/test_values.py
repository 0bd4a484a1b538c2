"""Ids, numbers, text and JSON: both databases give back the same, whatever it is."""

from __future__ import annotations

import json
import math
import re
import struct
import threading
import time
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignkit_serve.store import Store, StoreError, new_id
from alignkit_serve.store.inferences import begin, delete, finish, get
from alignkit_serve.store.values import clean, json_text, plain
from tests.serve.store.rows import a_completion, an_inference, answered, stored_policy

TEXT = st.text() | st.text(alphabet="\x00\ud800\udfff\ufffd\\\"'%a\n😀")
NUMBERS = st.integers(-(2**200), 2**200) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4)
)
LOGPROBS = st.none() | st.lists(st.floats(width=32, allow_nan=False), max_size=20).map(tuple)


def test_ids_are_version_7_and_sort_by_time() -> None:
    before = time.time_ns() // 1_000_000
    made = [new_id("x-") for _ in range(10_000)]
    after = time.time_ns() // 1_000_000
    assert made == sorted(set(made))
    for id in made:
        assert re.fullmatch("x-[0-9a-f]{32}", id)
        parsed = uuid.UUID(id[2:])
        assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)
    first, last = (int(id[2:14], 16) for id in (made[0], made[-1]))
    assert before <= first <= last <= after + 1


def test_ids_go_on_when_the_clock_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = new_id("")
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    after = [new_id("") for _ in range(1000)]
    assert [before, *after] == sorted({before, *after})


def test_threads_never_get_the_same_id_and_each_sees_its_own_grow() -> None:
    made: list[list[str]] = [[] for _ in range(8)]
    threads = [threading.Thread(target=lambda ids=ids: ids.extend(new_id("") for _ in range(3000))) for ids in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id for ids in made for id in ids}) == 24_000
    assert all(ids == sorted(ids) for ids in made)


@given(params=st.dictionaries(TEXT, JSON, max_size=4), words=TEXT, tokens=st.lists(st.integers(-(2**31), 2**31 - 1)), logprobs=LOGPROBS)
def roundtrip(store: Store, policy: Any, params: dict[str, Any], words: str, tokens: list[int], logprobs: tuple[float, ...] | None) -> None:
    asked = an_inference(policy, params=params, messages=[{"role": "user", "content": words}], model=words)
    said = a_completion(asked, text=words, token_ids=tuple(tokens), raw_logprobs=logprobs, behaviour_logprobs=logprobs)
    store.write(lambda connection: begin(connection, asked))
    store.write(lambda connection: finish(connection, asked.id, [said], status="done", prompt_tokens=1, completion_tokens=1)).result()
    found = store.read(lambda connection: get(connection, asked.id))
    assert found is not None
    assert found.inference.params == plain(params)
    assert json_text(found.inference.params) == json_text(plain(params))  # Equal to the letter: hashes are taken of it.
    assert found.inference.messages == [{"role": "user", "content": clean(words)}]
    assert (found.inference.model, found.completions[0].text) == (clean(words), clean(words))
    assert found.completions[0].token_ids == tuple(tokens)
    for kept in (found.completions[0].raw_logprobs, found.completions[0].behaviour_logprobs):
        assert (kept is None) == (logprobs is None)
        assert struct.pack(f"<{len(kept or ())}f", *(kept or ())) == struct.pack(f"<{len(logprobs or ())}f", *(logprobs or ()))


def test_any_text_json_and_array_comes_back(store: Store) -> None:
    roundtrip(store, stored_policy(store))


@given(JSON)
def test_what_is_plain_stays_equal_where_nothing_has_to_be_replaced(value: Any) -> None:
    replaced = re.search(r"\\u0000|\\ud[89a-f]", json.dumps(value))
    assert replaced or plain(value) == value
    assert plain(plain(value)) == plain(value)


def test_what_no_database_keeps_is_replaced_character_by_character() -> None:
    assert clean("a\x00b\ud83dc\ud83d\udca9") == "a\ufffdb\ufffdc\ufffd\ufffd"
    assert clean("😀 \x01\x7f\ufffe") == "😀 \x01\x7f\ufffe"
    assert plain({"k\x00": ["\x00", {"\udfff": 1}]}) == {"k\ufffd": ["\ufffd", {"\ufffd": 1}]}
    assert repr(plain([1e15, 1e16, 1e23, -1e23, -0.0, True, None])) == (
        "[1000000000000000.0, 10000000000000000, 99999999999999991611392, -99999999999999991611392, 0.0, True, None]"
    )


def test_an_id_with_strange_characters_is_simply_not_found(store: Store) -> None:
    inference, _ = answered(store, stored_policy(store))
    for id in (f"{inference.id}\x00", "\ud800", "'; DROP TABLE inference; --", "%"):
        assert store.read(lambda connection, id=id: get(connection, id)) is None
        assert not store.write(lambda connection, id=id: delete(connection, id)).result()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_have_are_refused(store: Store, number: float) -> None:
    asked = an_inference(stored_policy(store), params={"deep": [{"temperature": number}]})
    with pytest.raises(StoreError, match=f"{number} is not JSON and cannot be stored; send a finite number or null"):
        store.write(lambda connection: begin(connection, asked)).result()


def test_infinite_logprobs_are_numbers_as_any_other(store: Store) -> None:
    asked = an_inference(stored_policy(store))
    said = a_completion(asked, behaviour_logprobs=(-math.inf, 0.1, -3.5e-45))
    store.write(lambda connection: begin(connection, asked))
    store.write(lambda connection: finish(connection, asked.id, [said], status="done", prompt_tokens=1, completion_tokens=3)).result()
    found = store.read(lambda connection: get(connection, asked.id))
    assert found is not None
    # The nearest float32 numbers.
    assert found.completions[0].behaviour_logprobs == (-math.inf, 0.10000000149011612, -2.802596928649634e-45)


def test_times_without_a_timezone_are_refused(store: Store) -> None:
    policy = stored_policy(store)
    asked = an_inference(policy, created_at=policy.created_at.replace(tzinfo=None))
    with pytest.raises(Exception, match="has no timezone"):
        store.write(lambda connection: begin(connection, asked)).result()
