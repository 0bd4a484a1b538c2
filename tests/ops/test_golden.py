"""Every entry of the golden numbers: computed in float64 and float32, or skipped by name because alignkit has no such function.

``pytest tests/ops/test_golden.py --golden PATH`` takes another file of the same form.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ops.golden import COMPUTED, WRONG, as_tensor, as_tensors

PRECISIONS = {"float64": torch.float64, "float32": torch.float32}


@cache
def read(path: Path) -> dict[str, Any]:
    golden: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return golden


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "entry" in metafunc.fixturenames:
        metafunc.parametrize("entry", read(metafunc.config.getoption("--golden"))["entries"])


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> dict[str, Any]:
    return read(request.config.getoption("--golden"))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_golden(golden: dict[str, Any], entry: str, precision: str) -> None:
    if entry not in COMPUTED:
        pytest.skip(f"{entry}: alignkit has no such function")
    facts = golden["entries"][entry]
    tolerance = facts["tolerance"][precision]
    inputs = as_tensors(facts["inputs"], golden["inputs"], PRECISIONS[precision])
    for name, figure in COMPUTED[entry](inputs, facts["params"]).items():
        ours, want = as_tensor(figure), torch.tensor(facts["expected"][name], dtype=torch.float64)
        assert ours.shape == want.shape, name
        assert torch.allclose(ours, want, atol=tolerance, rtol=tolerance), f"{entry}.{name} is {ours}, expected {want}"


def test_no_figure_is_what_a_known_mistake_yields(golden: dict[str, Any]) -> None:
    for (entry, mistake), (figure, can_be_told_apart) in WRONG.items():
        facts = golden["entries"][entry]
        inputs = as_tensors(facts["inputs"], golden["inputs"], torch.float64)
        if can_be_told_apart(inputs):
            ours = as_tensor(COMPUTED[entry](inputs, facts["params"])[figure])
            theirs = torch.tensor(facts["expected"][mistake], dtype=torch.float64)
            assert not torch.allclose(ours, theirs, atol=1e-6, rtol=0.0), f"{entry}.{figure} equals {mistake}"
