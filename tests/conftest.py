"""For every test: how many threads torch uses, which examples property tests take, and which file of golden numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples each time, however busy the machine is, and no files left behind.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

# Before torch is imported by any test. Tiny tensors gain nothing from threads, and sums are the same on every machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="module")
def same_kernels() -> Iterator[None]:
    """Runs that are compared to the bit multiply alike; which way is fastest on a busy machine is another question each time."""
    from alignkit.models import kernels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_chosen", None)
        patch.setattr(kernels, "probe", kernels.Kernels)
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        metavar="PATH",
        type=Path,
        default=Path(__file__).parent / "golden" / "golden.json",
        help="golden numbers: another file of the same form as tests/golden/golden.json, from another seed or of other sizes",
    )
