"""For every test: how many threads torch uses, which examples property tests take, and which file of golden numbers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples each time, however busy the machine is, and no files left behind.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

# Before torch is imported by any test. Tiny tensors gain nothing from threads, and sums are the same on every machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        metavar="PATH",
        type=Path,
        default=Path(__file__).parent / "golden" / "golden.json",
        help="golden numbers: another file of the same form as tests/golden/golden.json, from another seed or of other sizes",
    )
