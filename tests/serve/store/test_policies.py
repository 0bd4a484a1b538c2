"""Policies: which steps there are, and that one at most is live, whoever promotes at the same time."""

from __future__ import annotations

import itertools
import threading

import pytest
from sqlalchemy import update
from sqlalchemy.exc import IntegrityError

from alignkit_serve.store import Store, StoreError
from alignkit_serve.store.policies import PolicyVersion, State, by_name, get, listed, live, move, promote, register
from alignkit_serve.store.tables import policy_version
from tests.serve.store.rows import a_policy, stored_policy

STATES: tuple[State, ...] = ("staged", "warm", "live", "draining", "retired")
STEPS = {
    ("staged", "warm"),
    ("staged", "retired"),
    ("warm", "live"),
    ("warm", "retired"),
    ("live", "draining"),
    ("draining", "live"),
    ("draining", "retired"),
    ("retired", "staged"),
}
WAY: dict[State, tuple[State, ...]] = {
    "staged": (),
    "warm": ("warm",),
    "live": ("warm", "live"),
    "draining": ("warm", "live", "draining"),
    "retired": ("retired",),
}


def in_state(store: Store, state: State) -> PolicyVersion:
    version = stored_policy(store)
    for step in WAY[state]:
        store.write(lambda connection, step=step: move(connection, version.id, step)).result()
    return version


def state_of(store: Store, version: PolicyVersion) -> State:
    found = store.read(lambda connection: get(connection, version.id))
    assert found is not None
    return found.state


def test_a_policy_comes_back_as_it_was_registered(store: Store) -> None:
    parent = stored_policy(store, name="sft")
    child = stored_policy(
        store, name="ppo-1", parent_id=parent.id, manifest_sha256="aa", tokenizer_sha256="bb", evaluation={"win_rate": 0.61, "n": 200}
    )
    assert store.read(lambda connection: get(connection, child.id)) == child
    assert store.read(lambda connection: by_name(connection, "sft")) == parent
    assert store.read(lambda connection: by_name(connection, "none")) is None
    assert store.read(lambda connection: get(connection, "none")) is None
    assert store.read(listed) == [parent, child]
    assert store.read(live) is None


def test_a_name_is_taken_once_and_a_new_version_is_staged(store: Store) -> None:
    stored_policy(store, name="sft")
    with pytest.raises(StoreError, match="there is a policy 'sft' already; give this one another name"):
        stored_policy(store, name="sft")
    with pytest.raises(StoreError, match="policy 'b' cannot be registered as live: a new version is staged"):
        stored_policy(store, name="b", state="live")


@pytest.mark.parametrize(("before", "after"), list(itertools.product(STATES, STATES)))
def test_only_these_steps_are_taken(store: Store, before: State, after: State) -> None:
    version = in_state(store, before)
    step = store.write(lambda connection: move(connection, version.id, after))
    if (before, after) in STEPS:
        step.result()
        assert state_of(store, version) == after
    else:
        with pytest.raises(StoreError, match=f"is {before} and cannot become {after}; allowed: "):
            step.result()
        assert state_of(store, version) == before


def test_a_promoted_version_takes_the_place_of_the_live_one_and_may_give_it_back(store: Store) -> None:
    old, new = in_state(store, "warm"), in_state(store, "warm")
    for version, states in ((old, ("live", "warm")), (new, ("draining", "live")), (old, ("live", "draining"))):
        store.write(lambda connection, version=version: promote(connection, version.id)).result()
        assert (state_of(store, old), state_of(store, new)) == states
        found = store.read(live)
        assert found is not None
        assert found.id == version.id


@pytest.mark.parametrize("state", ["staged", "live", "retired"])
def test_a_version_that_is_not_loaded_is_not_promoted(store: Store, state: State) -> None:
    version = in_state(store, state)
    with pytest.raises(StoreError, match=f"is {state} and cannot be promoted; allowed: one that is warm or draining"):
        store.write(lambda connection: promote(connection, version.id)).result()
    assert state_of(store, version) == state


def test_mistakes_name_what_there_is(store: Store) -> None:
    first = in_state(store, "live")
    second = in_state(store, "warm")
    with pytest.raises(StoreError, match=f"'{second.name}' cannot become live while '{first.name}' is; promote it"):
        store.write(lambda connection: move(connection, second.id, "live")).result()
    with pytest.raises(StoreError, match=f"there is no policy with the id 'pol-x'; registered are: {first.name}, {second.name}"):
        store.write(lambda connection: promote(connection, "pol-x")).result()


def test_the_database_itself_refuses_a_second_live_version(store: Store) -> None:
    in_state(store, "live")
    second = in_state(store, "warm")
    by_hand = update(policy_version).where(policy_version.c.id == second.id).values(state="live")
    with pytest.raises(IntegrityError):
        store.write(lambda connection: connection.execute(by_hand)).result()
    assert state_of(store, second) == "warm"


def test_twenty_threads_in_two_stores_promote_at_once_and_one_is_live(database_url: str) -> None:
    with Store.open(database_url) as one, Store.open(database_url) as other:
        versions = [a_policy() for _ in range(20)]
        for version in versions:
            one.write(lambda connection, version=version: register(connection, version)).result()
            one.write(lambda connection, version=version: move(connection, version.id, "warm")).result()
        start = threading.Barrier(20)
        lives: list[int] = []

        def race(place: int) -> None:
            store = (one, other)[place % 2]
            start.wait()
            for _ in range(5):
                refused = store.write(lambda connection: promote(connection, versions[place].id)).exception()
                assert refused is None or "is live and cannot be promoted" in str(refused)
                lives.append(sum(each.state == "live" for each in store.read(listed)))

        threads = [threading.Thread(target=race, args=(place,)) for place in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert lives == [1] * 100
        assert sorted(each.state for each in one.read(listed)) == ["draining"] * 19 + ["live"]
