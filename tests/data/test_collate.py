"""Batches hold their rows and nothing else, and microbatches hold each row once, within their budget."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as some

from alignkit.data.collate import best_fit, collate, length_buckets, pack
from alignkit.interfaces import TokenBatch
from alignkit.types import TokenRow


@some.composite
def token_rows(draw: some.DrawFn) -> list[TokenRow]:
    """Rows that may be of id 0 throughout, which is also what pads."""
    tokens = some.lists(some.tuples(some.integers(0, 3), some.booleans()), min_size=1, max_size=9)
    rows = [list(zip(*row, strict=True)) for row in draw(some.lists(tokens, min_size=1, max_size=7))]
    return [TokenRow(str(number), ids, loss_mask) for number, (ids, loss_mask) in enumerate(rows)]


def rows_of(batch: TokenBatch, names: list[str]) -> list[TokenRow]:
    """The way back: what the mask says is there."""
    found = zip(names, batch.ids, batch.mask, batch.loss_mask, strict=True)
    return [TokenRow(name, tuple(ids[mask].tolist()), tuple(loss_mask[mask].tolist())) for name, ids, mask, loss_mask in found]


def test_a_batch_by_hand() -> None:
    batch = collate([TokenRow("a", (5, 0), (False, True)), TokenRow("b", (7, 8, 0), (True, False, True))])
    assert batch.ids.tolist() == [[5, 0, 0], [7, 8, 0]]
    assert batch.mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.loss_mask.tolist() == [[False, True, False], [True, False, True]]


@given(token_rows())
def test_a_batch_gives_its_rows_back(rows: list[TokenRow]) -> None:
    batch = collate(rows)
    assert rows_of(batch, [row.id for row in rows]) == rows
    assert not (batch.loss_mask & ~batch.mask).any()
    assert batch.ids.shape[1] == max(map(len, rows))


@given(token_rows(), some.integers(1, 30))
def test_microbatches_together_are_the_batch(rows: list[TokenRow], max_tokens: int) -> None:
    buckets = length_buckets([len(row) for row in rows], max_tokens)
    parts = [rows_of(collate([rows[i] for i in bucket]), [rows[i].id for i in bucket]) for bucket in buckets]
    assert sorted((row for part in parts for row in part), key=lambda row: int(row.id)) == rows


@given(some.lists(some.tuples(some.integers(1, 20), some.integers(1, 9)), min_size=1, max_size=20), some.integers(1, 100))
def test_a_microbatch_is_within_its_budget_or_a_single_item(items: list[tuple[int, int]], max_tokens: int) -> None:
    lengths, sizes = [length for length, _ in items], [size for _, size in items]
    buckets = length_buckets(lengths, max_tokens, sizes)
    assert sorted(i for bucket in buckets for i in bucket) == list(range(len(items)))
    for bucket in buckets:
        padded = sum(sizes[i] for i in bucket) * max(lengths[i] for i in bucket)
        assert padded <= max_tokens or len(bucket) == 1


def test_rows_of_like_length_go_together_longest_first() -> None:
    assert length_buckets([3, 9, 4, 10, 2], 20) == [[3, 1], [2, 0, 4]]


def test_a_group_counts_with_all_its_rows() -> None:
    # Three rankings with rows of 4 tokens and 2, 3 and 2 responses: 12 tokens hold the first alone or the last with nothing beside.
    assert length_buckets([4, 4, 4], 12, [2, 3, 2]) == [[0], [1], [2]]
    assert length_buckets([4, 4, 4], 20, [2, 3, 2]) == [[0, 1], [2]]


def test_what_exceeds_the_budget_by_itself_is_alone() -> None:
    assert length_buckets([100, 3, 3], 10) == [[0], [1, 2]]


@given(some.lists(some.integers(1, 12), min_size=1, max_size=20), some.integers(1, 12))
def test_best_fit_puts_each_row_into_one_bin_that_has_room_for_it(lengths: list[int], width: int) -> None:
    bins = best_fit(lengths, width)
    assert sorted(i for one in bins for i in one) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in one) <= width or len(one) == 1 for one in bins)


def test_best_fit_by_hand() -> None:
    # Longest first: 7 | 5 and 4 | then 3 fills the first bin, and 2 finds no room.
    assert best_fit([2, 7, 4, 5, 3], 10) == [[1, 4], [3, 2], [0]]


def test_a_packed_row_by_hand() -> None:
    first, second = TokenRow("a", (5, 6, 7), (True, False, True)), TokenRow("b", (8, 9), (False, True))
    packed = pack([[first, second], [second]])
    assert packed.ids.tolist() == [[5, 6, 7, 8, 9], [8, 9, 0, 0, 0]]
    assert packed.mask.tolist() == [[True] * 5, [True, True, False, False, False]]
    assert packed.loss_mask.tolist() == [[False, False, True, False, True], [False, True, False, False, False]]  # nothing predicts a first
    assert packed.positions is not None
    assert packed.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
