"""The global generators go on where they were, whoever draws from them."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from alignkit.generators import Generators
from alignkit.interfaces import State


def draws() -> list[float]:
    """From all of them; two normal numbers from each, since the second of a pair may be kept for later."""
    drawn = [random.gauss(), random.random(), np.random.normal(), np.random.random(), float(torch.randn(())), float(torch.rand(()))]
    if torch.cuda.is_available():
        drawn.append(float(torch.rand((), device="cuda")))
    return drawn


def test_a_seed_is_a_beginning() -> None:
    Generators(2**62 + 1)
    first = draws()
    Generators(2**62 + 1)
    assert draws() == first
    Generators(2**62 + 2)
    assert all(old != new for old, new in zip(first, draws(), strict=True))


@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_state_that_was_written_down_goes_on(before: int) -> None:
    generators = Generators(3)
    for _ in range(before):
        draws()
    saved = generators.state()
    written = State({name: tensor.clone() for name, tensor in saved.tensors.items()}, json.loads(json.dumps(dict(saved.values))))
    expected = [draws(), draws()]
    Generators(4).load_state(written)
    assert [draws(), draws()] == expected
