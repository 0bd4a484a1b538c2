"""Two pieces of work at the same time are the two pieces of work."""

import threading
from collections.abc import Iterator

import pytest
import torch

from alignkit.beside import beside

CPU = torch.device("cpu")


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many of torch's."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [2, 4], indirect=True)
def test_both_are_done_at_once_on_half_of_the_threads_each(threads: int) -> None:
    met = threading.Barrier(2, timeout=60)

    def work() -> tuple[int, int]:
        met.wait()  # one alone would wait for ever
        return threading.get_ident(), torch.get_num_threads()

    with beside(CPU) as both:
        for _ in range(2):
            (first, mine), (second, theirs) = both(work, work)
            assert first == threading.get_ident() != second
            assert mine == theirs == threads // 2
            assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("threads", "device"), [(1, "cpu"), (3, "cpu"), (2, "cuda")], indirect=["threads"])
def test_otherwise_one_is_done_after_the_other(threads: int, device: str) -> None:
    done: list[tuple[str, int, int]] = []
    with beside(torch.device(device)) as both:
        both(*(lambda name=name: done.append((name, threading.get_ident(), torch.get_num_threads())) for name in ("first", "second")))
    assert done == [("first", threading.get_ident(), threads), ("second", threading.get_ident(), threads)]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("threads", [2], indirect=True)
@pytest.mark.parametrize("grad", [True, False])
def test_gradients_are_wanted_by_both_or_by_none(grad: bool) -> None:
    with torch.set_grad_enabled(grad), beside(CPU) as both:
        assert both(torch.is_grad_enabled, torch.is_grad_enabled) == (grad, grad)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_either_is_raised_when_the_other_one_is_done(threads: int, failing: int) -> None:
    done = threading.Event()

    def fails() -> None:
        raise ValueError("on purpose")

    with beside(CPU) as both:
        with pytest.raises(ValueError, match="on purpose"):
            both(*((fails, done.set) if failing == 0 else (done.set, fails)))
        assert done.is_set() or (threads == 1 and failing == 0)
        assert torch.get_num_threads() == threads
        assert both(lambda: 1, lambda: 2) == (1, 2)
