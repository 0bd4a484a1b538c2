"""Groups of candidates: each completion in its slot, once."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sqlalchemy.exc import IntegrityError

from alignkit_serve.store import Store, new_id
from alignkit_serve.store.groups import Group, add_group, get_group
from tests.serve.store.rows import answered, stored_policy


def a_group(store: Store) -> Group:
    policy = stored_policy(store)
    (asked, left), (_, right) = answered(store, policy), answered(store, policy)
    drawn = {"slots": [right.id, left.id], "seed": 2**40}
    return Group(new_id("grp-"), asked.prompt_sha256, "ab", drawn, asked.id, ((right.id, 0), (left.id, 1)))


def test_a_group_comes_back_with_its_candidates_by_slot(store: Store) -> None:
    group = a_group(store)
    turned = replace(group, candidates=group.candidates[::-1])
    store.write(lambda connection: add_group(connection, turned)).result()
    assert store.read(lambda connection: get_group(connection, group.id)) == group
    assert store.read(lambda connection: get_group(connection, "grp-none")) is None


def test_a_pool_has_neither_an_inference_nor_a_presentation_yet(store: Store) -> None:
    pool = replace(a_group(store), origin="label_pool", presentation=None, inference_id=None)
    store.write(lambda connection: add_group(connection, pool)).result()
    assert store.read(lambda connection: get_group(connection, pool.id)) == pool


def test_a_completion_and_a_slot_are_taken_once(store: Store) -> None:
    group = a_group(store)
    (first, _), (second, _) = group.candidates
    for twice in (((first, 0), (first, 1)), ((first, 0), (second, 0)), ((first, 0), ("cpl-none", 1))):
        with pytest.raises(IntegrityError):
            store.write(lambda connection, twice=twice: add_group(connection, replace(group, candidates=twice))).result()
    assert store.read(lambda connection: get_group(connection, group.id)) is None
