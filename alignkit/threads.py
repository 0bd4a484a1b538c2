"""How torch's threads wait for each other."""

from __future__ import annotations

import os


def wait_briefly() -> None:
    """Let idle threads look for work for some microseconds before they sleep; to be called before torch is imported.

    Between two operations of a small model there is less time than it takes to wake a thread, so that sleeping at once makes decoding
    take 1.7 times as long; but those that look for long, as they do by default, take the cores from whoever else works (5 times as long
    beside one other busy process, where this makes it 2). Measured with 135 million weights on two cores.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
