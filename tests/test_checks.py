"""What stops a run while it runs, and what the message says."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import alignkit
from alignkit import checks
from alignkit.errors import RunError
from alignkit.interfaces import TokenBatch
from alignkit.types import TokenRow

ROWS = torch.ones(2, 3, dtype=torch.bool)
BATCH = TokenBatch(torch.arange(6).reshape(2, 3), ROWS, ROWS)


def test_a_ratio_of_one_within_rounding_passes_and_anything_else_stops() -> None:
    checks.ratio_is_one(torch.tensor([0.0, 9e-5, -9e-5]), exact=True)
    checks.ratio_is_one(torch.tensor([0.3, 0.0, 0.0, 0.0]), exact=False)  # 0.075 on average, of 0.1
    checks.ratio_is_one(torch.zeros(0), exact=True)
    with pytest.raises(RunError, match=r"differ by 0\.0002 nats a token .* likely causes: dropout .* set checks: off"):
        checks.ratio_is_one(torch.tensor([0.0, 4e-4]), exact=True)
    with pytest.raises(RunError, match=r"differ by 0\.2 nats"):
        checks.ratio_is_one(torch.tensor([0.2, -0.2]), exact=False)
    with pytest.raises(RunError, match="differ by nan nats"):
        checks.ratio_is_one(torch.tensor([float("nan")]), exact=True)


def test_one_token_at_which_the_model_amplifies_rounding_does_not_stop_a_run() -> None:
    """As seen of SmolLM2-135M in float32: 2.6e-4 and 1.3e-3 nats at one place each, and 4e-6 everywhere else."""
    change = torch.full((500,), 4e-6)
    change[123] = 1.3e-3
    checks.ratio_is_one(change, exact=True)


def test_a_negative_divergence_stops() -> None:
    checks.divergence_is_not_negative(torch.tensor([0.0, 3.0]))
    for wrong in (-0.1, float("nan")):
        with pytest.raises(RunError, match="k3 estimate of the KL to the reference is"):
            checks.divergence_is_not_negative(torch.tensor([0.0, wrong]))


def test_a_reward_that_padding_changes_stops() -> None:
    def last_column(batch: TokenBatch) -> Tensor:
        return batch.ids[:, -1].float()

    def last_real(batch: TokenBatch) -> Tensor:
        return torch.tensor([float(ids[mask][-1]) for ids, mask in zip(batch.ids, batch.mask, strict=True)])

    checks.padding_changes_nothing(last_real, BATCH, exact=True)
    with pytest.raises(RunError, match="padding changes the reward model's scores by 5"):
        checks.padding_changes_nothing(last_column, BATCH, exact=True)


def test_demonstrations_of_which_none_ends_stop() -> None:
    ends, cut = TokenRow("a", (5, 9), (False, True)), TokenRow("b", (9, 6), (False, True))
    checks.end_of_turn_is_trained([cut, ends], stop_ids=(9,))
    with pytest.raises(RunError, match=r"would never learn to stop; .*raise max_length"):
        checks.end_of_turn_is_trained([cut], stop_ids=(9,))  # it has a stop token, and does not train it


def test_another_template_stops_and_names_the_stage() -> None:
    checks.same_template("a1", "a1", "sft")
    with pytest.raises(RunError, match="are not those that stage sft was made with"):
        checks.same_template("a1", "b2", "sft")


def test_packed_documents_that_see_each_other_stop() -> None:
    checks.documents_are_apart(torch.tensor([-1.0, -2.0]), torch.tensor([-1.00005, -2.0]), exact=True)
    with pytest.raises(RunError, match=r"packing changes log-probabilities by 0\.25 nats a token"):
        checks.documents_are_apart(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0]), exact=True)


@pytest.mark.parametrize("switch", ["on", "off"])
def test_a_run_makes_every_check_and_with_checks_off_none(switch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = {name: check for name, check in inspect.getmembers(checks, inspect.isfunction) if check.__module__ == checks.__name__}
    for plugin in ("sft", "reward_model", "ppo"):
        importlib.import_module(f"alignkit_{plugin}.update")
    made: set[str] = set()
    for module in list(sys.modules.values()):
        for name, check in every.items():
            if vars(module).get(name) is check:
                monkeypatch.setattr(module, name, lambda *facts, name=name, **options: made.add(name))
    config = Path(__file__).parent.parent / "configs" / "smoke.yaml"
    short = ["sft.optimizer.epochs=1", "sft.optimizer.packing=true", "reward.optimizer.epochs=1", "ppo.optimizer.iterations=1"]
    alignkit.run(config, [f"dir={tmp_path / 'run'}", f"checks={switch}", *short])
    assert made == (set(every) if switch == "on" else set())
