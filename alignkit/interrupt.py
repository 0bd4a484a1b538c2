"""Ctrl-C and SIGTERM ask the run to stop at the next step's end; a second one stops it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from alignkit.errors import Interrupted


class StopRequest:
    """Set by a signal, asked by the loops."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def check(self, where: str) -> None:
        """Raise ``Interrupted`` if a stop was asked for; ``where`` says what has been kept."""
        if self.signal is not None:
            raise Interrupted(f"stopped: {where}. The same command continues it.", exit_code=128 + self.signal)


@contextmanager
def stop_on_signal(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """Within, the first SIGINT or SIGTERM sets the request and the second acts as usual. Outside the main thread nothing is caught."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal = number
        for caught, previous in before.items():
            signal.signal(caught, previous)
        say("stopping at the end of this step; once more to stop at once")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for caught, previous in before.items():
            signal.signal(caught, previous)
