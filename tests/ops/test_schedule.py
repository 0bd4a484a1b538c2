from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignkit.ops.schedule import schedule


def shares(total: int, **options: object) -> list[float]:
    return [schedule(step, total, **options) for step in range(total)]


def test_a_warm_up_worked_by_hand() -> None:
    # Ten steps, the first four rise: 1/5, 2/5, 3/5, 4/5, then 1 and down to nothing in six equal parts.
    got = shares(10, warmup=0.4, decay="linear", floor=0.0)
    assert got == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_a_warm_up_does_not_begin_below_the_floor() -> None:
    # InstructGPT's PPO: from 0.1 of the peak over ten iterations, then constant.
    got = shares(20, warmup=0.5, decay="constant", floor=0.1)
    assert got == pytest.approx([0.1 + 0.09 * i for i in range(10)] + [1.0] * 10)


def test_cosine_is_half_way_in_the_middle_and_ends_at_its_floor() -> None:
    assert schedule(5, 10, warmup=0.0, decay="cosine", floor=0.1) == pytest.approx(0.55)
    assert schedule(10, 10, warmup=0.0, decay="cosine", floor=0.1) == pytest.approx(0.1)
    assert schedule(99, 10, warmup=0.0, decay="cosine", floor=0.1) == pytest.approx(0.1)


@given(st.integers(1, 300), st.floats(0.0, 0.99), st.sampled_from(["constant", "linear", "cosine"]), st.floats(0.0, 1.0))
def test_it_rises_then_falls_and_stays_between_floor_and_peak(total: int, warmup: float, decay: str, floor: float) -> None:
    got = shares(total, warmup=warmup, decay=decay, floor=floor)
    top = got.index(max(got))
    assert all(floor - 1e-9 <= share <= 1.0 + 1e-9 for share in got)
    assert all(share > 0.0 for share in got)
    assert all(a <= b + 1e-12 for a, b in pairwise(got[: top + 1]))
    assert all(a >= b - 1e-12 for a, b in pairwise(got[top:]))
