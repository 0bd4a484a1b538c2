"""Two pieces of work that do not depend on each other, at the same time: each on half of the processor's threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

First = TypeVar("First")
Second = TypeVar("Second")
Result = TypeVar("Result")


class Both(Protocol):
    """A way of doing two pieces of work."""

    def __call__(self, first: Callable[[], First], second: Callable[[], Second]) -> tuple[First, Second]:
        """Both results. Where one piece fails, its error is raised, and by then the other one is not being done any more."""


def one_after_another(first: Callable[[], First], second: Callable[[], Second]) -> tuple[First, Second]:
    """As it is without a second thread."""
    return first(), second()


@contextmanager
def beside(device: torch.device) -> Iterator[Both]:
    """Within, a second thread is there for the second piece of work, which must not touch what the first one writes.

    An operation on few numbers, and what Python does between two of them, keeps one core busy; two models that are computed beside each
    other keep two. Where the work is a GPU's, or the number of threads is odd, one piece is done after the other. Either way the numbers
    are a function of the number of threads alone.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads % 2:
        yield one_after_another
        return
    # The thread ends with the block: those that help it would otherwise be in the way of the next rollout.
    with ThreadPoolExecutor(1) as pool:

        def both(first: Callable[[], First], second: Callable[[], Second]) -> tuple[First, Second]:
            torch.set_num_threads(threads // 2)
            other = pool.submit(_with_threads, threads // 2, torch.is_grad_enabled(), second)
            try:
                found = first()
            finally:
                wait([other])
                torch.set_num_threads(threads)
            return found, other.result()

        yield both


def _with_threads(threads: int, grad: bool, work: Callable[[], Result]) -> Result:
    """``work`` in a thread that knows nothing yet of how many threads it has and whether gradients are wanted."""
    torch.set_num_threads(threads)
    with torch.set_grad_enabled(grad):
        return work()
