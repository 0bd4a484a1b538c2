"""TRL trains on what is exported, as it is: RewardTrainer on comparisons, KTOTrainer on labels, SFTTrainer on demonstrations."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from alignkit_serve.exporting import obtain
from alignkit_serve.store import Store
from tests.environments import missing
from tests.fakes import tiny_folder
from tests.serve.store.rows import stored_policy
from tests.serve.store.test_exports import asked, opine, wanted

SCRIPT = Path(__file__).parent / "clients" / "trl_trains.py"
PYTHON = os.environ.get("ALIGNKIT_CLIENTS_TRL")


@pytest.mark.slow
def test_trl_trains_on_exports(tmp_path: Path) -> None:
    if PYTHON is None:
        missing("`make clients` makes an environment with TRL; ALIGNKIT_CLIENTS_TRL names its interpreter")
    with Store.open(f"sqlite:///{tmp_path / 'store.db'}") as store:
        policy = stored_policy(store)
        for number in range(8):
            made, (a, b) = asked(store, policy, f"What is {number}?", f"It is {number}.", "Nothing.")
            opine(store, "preference", made.id, {"a": a.id, "b": b.id, "choice": "a", "strength": 2}, on="inference")
            opine(store, "thumb", a.id, "up")
            opine(store, "flag", b.id, "hallucination")
            opine(store, "demonstration", made.id, f"It is the number {number}.", on="inference")
        files = [obtain(store, wanted(shape), tmp_path / "exports")[1] for shape in ("comparisons", "labels", "demonstrations")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [PYTHON, SCRIPT, tiny_folder(), *files, tmp_path], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.splitlines()[-1] == "all three train on exports"
