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


@pytest.fixture(scope="module", autouse=True)
def _multiply_alike() -> Iterator[None]:
    """Every test multiplies in the plain way, whatever is fastest on a busy machine at that moment; those of the other ways name them."""

    from alignkit.models import kernels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_chosen", kernels.plain())
        patch.setattr(kernels, "probe", kernels.plain)
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        metavar="PATH",
        type=Path,
        default=Path(__file__).parent / "golden" / "golden.json",
        help="golden numbers: another file of the same form as tests/golden/golden.json, from another seed or of other sizes",
    )
