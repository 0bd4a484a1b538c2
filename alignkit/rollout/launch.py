"""How a step of decoding is started on a device: call by call, or as a graph that was recorded once.

A small model's step is hundreds of calls of a microsecond or two each: a GPU is done with one before Python has made the next. A CUDA graph
starts all of them at once, with the addresses and shapes that they had when they were recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch

from alignkit.models.decoding import Decoding

Work = Callable[[], Any]


class Launch(Protocol):
    """``ahead``: how many draws a device is given before the first of them is read, so that it need not wait for the host."""

    ahead: int

    def rows(self, count: int) -> int:
        """How many rows to compute where ``count`` are wanted."""

    def __call__(self, place: Hashable, shape: Hashable, work: Work) -> Any:
        """What ``work`` returns: it does the same to what is stored at ``place``, in ``shape``, each time it is asked for with them."""


def launch_on(model: Decoding) -> Launch:
    """How to start steps of ``model``."""
    if model.device.type != "cuda":
        return CallByCall()
    return Graphs(recorder) if model.recordable else CallByCall(ahead=1)


class CallByCall:
    """Each call by itself."""

    def __init__(self, ahead: int = 0) -> None:
        self.ahead = ahead

    def rows(self, count: int) -> int:
        """As many as are wanted."""
        return count

    def __call__(self, place: Hashable, shape: Hashable, work: Work) -> Any:
        """Do it."""
        return work()


class Graphs:
    """Each shape of a step is recorded the second time that it is wanted: the first time, call by call, loads what it needs, and many are
    wanted only once. So that few shapes are, rows are rounded up.
    """

    ahead = 1

    def __init__(self, recorder: Callable[[], Callable[[Work], Work]]) -> None:
        self._recorder = recorder
        self._record = recorder()
        self._place: Hashable = None
        self._known: dict[Hashable, Work | None] = {}

    def rows(self, count: int) -> int:
        """The next power of two: to record a shape takes as long as thirty steps of it."""
        return 1 << (count - 1).bit_length()

    def __call__(self, place: Hashable, shape: Hashable, work: Work) -> Any:
        """Replay it where it was recorded for this very place."""
        if place != self._place:
            self._place, self._known, self._record = place, {}, self._recorder()
        if shape not in self._known:
            self._known[shape] = None
            return work()
        replay = self._known[shape] or self._record(work)
        self._known[shape] = replay
        return replay()


def recorder() -> Callable[[Work], Work]:
    """Records work of the GPU as graphs, which share their memory since one of them runs at a time."""
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def record(work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # Not with torch.cuda.graph, which first gives all memory back that is free: training would have to ask for it again.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                made = work()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

        def replay() -> Any:
            graph.replay()
            return made

        return replay

    return record
