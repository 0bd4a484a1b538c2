"""An order visits each row once an epoch, in the same way however it is asked, interrupted and continued."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some

from alignkit.data.order import Order
from alignkit.errors import DataError

sizes = some.integers(1, 40)
batches = some.lists(some.integers(0, 30), max_size=8)


@given(size=sizes, seed=some.integers(0, 2**40), epochs=some.integers(1, 3))
def test_every_epoch_visits_each_row_once(size: int, seed: int, epochs: int) -> None:
    order = Order(size, seed, "sft")
    for _ in range(epochs):
        assert sorted(order.take(size)) == list(range(size))


@given(size=sizes, counts=batches)
def test_the_size_of_the_batches_does_not_change_the_order(size: int, counts: list[int]) -> None:
    order = Order(size, 3, "sft")
    assert [i for count in counts for i in order.take(count)] == Order(size, 3, "sft").take(sum(counts))


@given(size=sizes, before=some.integers(0, 100), after=some.integers(0, 100))
def test_a_continued_order_is_the_uninterrupted_one(size: int, before: int, after: int) -> None:
    order, other = Order(size, 3, "sft"), Order(size, 3, "sft")
    order.take(before)
    other.load_state(order.state())
    assert other.take(after) == order.take(after)


def test_the_order_is_the_same_on_every_machine_and_in_every_version() -> None:
    assert Order(6, 17, "sft").take(12) == [1, 2, 3, 4, 0, 5, 5, 2, 3, 1, 4, 0]


def test_seed_name_and_epoch_each_change_it() -> None:
    first = Order(50, 0, "sft")
    orders = [first.take(50), first.take(50), Order(50, 1, "sft").take(50), Order(50, 0, "reward").take(50)]
    assert len({tuple(order) for order in orders}) == 4


def test_no_rows_are_an_error() -> None:
    with pytest.raises(DataError, match="sft: there are no rows"):
        Order(0, 0, "sft")


def test_with_another_number_of_rows_the_epoch_begins_anew() -> None:
    before, after, fresh = Order(5, 0, "sft"), Order(4, 0, "sft"), Order(4, 0, "sft")
    before.take(8)  # the second epoch
    after.load_state(before.state())
    fresh.take(4)
    assert after.take(4) == fresh.take(4)
