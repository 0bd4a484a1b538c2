"""Each filter against its definition, written out the long way."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignkit.rollout import filters as rows
from alignkit.rollout.filters import Filters

LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.0])


def filtered(logits: torch.Tensor, filters: Filters, temperature: float, drawn: list[int]) -> torch.Tensor:
    """Of one row, which has a neighbour that must not matter."""
    both = rows.filtered(torch.stack([logits, -logits]), [filters, Filters(top_p=0.5)], [temperature, 0.3], [drawn, []])
    alone = rows.filtered(logits[None], [filters], [temperature], [drawn])
    assert torch.equal(both[0], alone[0])
    return alone[0]


def shares(logits: torch.Tensor) -> list[float]:
    return [round(share, 4) for share in logits.softmax(dim=0).tolist()]


def test_no_filter_divides_by_the_temperature_and_does_nothing_else() -> None:
    assert filtered(LOGITS, Filters(), 2.0, [1, 1]).tolist() == [0.5, 1.5, 1.0, 0.0]


def test_at_temperature_0_the_likeliest_token_is_certain() -> None:
    assert shares(filtered(LOGITS, Filters(), 0.0, [])) == [0.0, 1.0, 0.0, 0.0]


def test_penalties_follow_the_formula_of_openais_api() -> None:
    # Token 1 was drawn three times and token 2 once: 3 - (3 * 0.5 + 1) = 0.5, and 2 - (0.5 + 1) = 0.5.
    filters = Filters(frequency_penalty=0.5, presence_penalty=1.0)
    assert filtered(LOGITS, filters, 1.0, [1, 2, 1, 1]).tolist() == [1.0, 0.5, 0.5, 0.0]


def test_a_bias_is_added_before_the_temperature_and_to_the_penalty() -> None:
    filters = Filters(presence_penalty=1.0, bias=((0, 100.0), (3, -100.0)))
    assert filtered(LOGITS, filters, 2.0, [0]).tolist() == [50.0, 1.5, 1.0, -50.0]
    assert shares(filtered(LOGITS, filters, 0.0, [])) == [1.0, 0.0, 0.0, 0.0]


def test_top_k_leaves_the_likeliest_k() -> None:
    assert filtered(LOGITS, Filters(top_k=2), 1.0, []).tolist() == [-math.inf, 3.0, 2.0, -math.inf]
    assert filtered(LOGITS, Filters(top_k=9), 1.0, []).tolist() == LOGITS.tolist()


@pytest.mark.parametrize(
    ("top_p", "left"), [(0.0, [1]), (0.64, [1]), (0.65, [1, 2]), (0.88, [1, 2]), (0.89, [0, 1, 2]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_leaves_the_smallest_set_that_reaches_it(top_p: float, left: list[int]) -> None:
    # The shares are 0.0871, 0.6439, 0.2369, 0.0321.
    found = filtered(LOGITS, Filters(top_p=top_p), 1.0, [])
    assert [i for i, value in enumerate(found.tolist()) if value > -math.inf] == left


def test_top_p_counts_among_what_top_k_has_left() -> None:
    # Of tokens 1 and 2 alone the shares are 0.731 and 0.269.
    found = filtered(LOGITS, Filters(top_k=2, top_p=0.72), 1.0, [])
    assert [i for i, value in enumerate(found.tolist()) if value > -math.inf] == [1]


@given(st.lists(st.integers(-800, 800), min_size=1, max_size=300, unique=True), st.floats(0.01, 0.999), st.floats(0.2, 3.0))
def test_the_nucleus_is_the_one_that_sorting_finds(values: list[int], top_p: float, temperature: float) -> None:
    logits = torch.tensor(values) / 100.0
    found = filtered(logits, Filters(top_p=top_p), temperature, [])
    order = logits.argsort(descending=True)
    likeliest = (logits / temperature).double().softmax(dim=0)[order].tolist()
    kept, total = 0, 0.0
    while kept == 0 or (kept < len(likeliest) and total < top_p):
        total += likeliest[kept]
        kept += 1
    # Where the sum is as good as equal to top_p, rounding decides.
    if abs(total - top_p) > 1e-6 and abs(total - likeliest[kept - 1] - top_p) > 1e-6:
        assert sorted(order[:kept].tolist()) == [i for i, value in enumerate(found.tolist()) if value > -math.inf]
