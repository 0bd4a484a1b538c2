"""A checkpoint holds all that is needed, and nothing that is not: with any one item left out, the run becomes another."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.checkpoint import load_checkpoint, save_checkpoint
from alignkit.generators import Generators
from alignkit.interfaces import State
from tests.faults.conftest import Faults
from tests.faults.running import Project, Traces, traces

pytestmark = pytest.mark.slow

States = dict[str, State]
Removal = Callable[[States], None]


def without(part: str, *path: str, **values: object) -> Removal:
    """The part's values, or those that ``path`` leads to, as they are at its beginning."""

    def remove(states: States) -> None:
        changed = copy.deepcopy(dict(states[part].values))
        inner = changed
        for key in path:
            inner = inner[key]
        assert all(inner[key] != value for key, value in values.items()), "the item is at its beginning: nothing is left out"
        inner.update(values)
        states[part] = State(states[part].tensors, changed)

    return remove


def without_tensors(prefix: str, of: Callable[[str], bool] = lambda name: True) -> Removal:
    """The optimizer's tensors of that name are not there, so that what it was built with stays."""

    def remove(states: States) -> None:
        kept = {name: tensor for name, tensor in states["optimizer"].tensors.items() if not name.startswith(prefix)}
        assert len(kept) < len(states["optimizer"].tensors)
        states["optimizer"] = State(kept, states["optimizer"].values)

    return remove


def without_average(states: States) -> None:
    """As if the average began at the weights."""
    tensors = dict(states["optimizer"].tensors)
    for name in [name for name in tensors if name.startswith("average/")]:
        tensors[name] = tensors[f"policy/weight/{name.removeprefix('average/')}"]
    states["optimizer"] = State(tensors, states["optimizer"].values)


def without_generator(name: str) -> Removal:
    """As a process has it that begins the stage."""

    def remove(states: States) -> None:
        fresh, saved = Generators(0).state(), states["generators"]
        states["generators"] = State(
            {key: (fresh if key == name else saved).tensors[key] for key in saved.tensors},
            {key: (fresh if key == name else saved).values[key] for key in saved.values},
        )

    return remove


def without_the_last_iteration(states: States) -> None:
    """From the beginning it would count in step again, where it was stopped after an even number of them."""
    values = states["watch"].values
    states["watch"] = State(values={**values, "iteration": values["iteration"] - 1})


ITEMS: dict[str, Removal] = {
    "policy": without_tensors("policy/weight/"),
    "policy's moments": without_tensors("policy/adam."),
    "policy's schedule": without("optimizer", "policy", step=0),
    "critic": without_tensors("critic/weight/"),
    "critic's moments": without_tensors("critic/adam."),
    "critic's schedule": without("optimizer", "critic", step=0),
    "average of weights": without_average,
    "KL coefficient": without("optimizer", kl_coef=0.05),
    "iteration": without("optimizer", iteration=0),
    "place in the pretraining text": without("optimizer", "pretraining", epoch=0),
    "place in the prompts": without("order", epoch=0),
    "statistics of the reward": without("reward", "mood", count=0, total=0.0),
    "statistics of the judge": without("judge", count=0, total=0.0),
    "statistics of the second opinion": without("opinion", count=0, total=0.0),
    "candidates": without("selection", candidates=[]),
    "iterations between looks": without_the_last_iteration,
    "rewards that were watched": without("watch", window=[]),
    "how the watch began": without("watch", "start", length=[], cut=[], entropy=[]),
    # Where it is what the config says there is nothing to leave out: the other way round, as after memory had not sufficed.
    "size of microbatches": without("optimizer", "policy", microbatch_tokens=16),
    "Python's generator": without_generator("python"),
    "NumPy's generator": without_generator("numpy"),
    "torch's generator": without_generator("torch"),
}


PPO_VALUES = {"policy", "critic", "average", "pretraining", "kl_coef", "iteration"}
"""Of the optimizer's values, those that are left out above. Its count for the guard of the KL, and what the guard holds, change something
in a run that goes wrong: ``tests/guards/test_resume.py``. What the watch has warned of, and the judge's means so far, change nothing but
warnings, which a run that is killed may say twice.
"""


def test_a_run_that_was_stopped_goes_on_to_the_same_end(project: Project, uninterrupted: Traces, going_on: Path, faults: Faults) -> None:
    faults("SIGTERM in ppo")
    project.go_on(going_on)
    assert traces(going_on) == uninterrupted


@pytest.mark.parametrize("item", ITEMS)
def test_every_item_of_state_is_needed(project: Project, uninterrupted: Traces, going_on: Path, item: str) -> None:
    checkpoints = going_on / "ppo" / "checkpoints"
    saved = load_checkpoint(checkpoints, print)
    assert saved is not None
    states = dict(saved.states)
    ITEMS[item](states)
    save_checkpoint(checkpoints, saved.step, states, keep=1)
    project.go_on(going_on)
    assert traces(going_on) != uninterrupted


def test_the_items_are_all_that_a_checkpoint_holds(stopped: Path) -> None:
    saved = load_checkpoint(stopped / "ppo" / "checkpoints", print)
    assert saved is not None
    found = ["inputs", "guard", "optimizer", "order", "reward", "selection", "judge", "opinion", "watch", "generators"]
    assert list(saved.states) == found  # the order of loading
    assert set(saved.states["watch"].values) == {"iteration", "window", "start", "warned", "holdout"}
    assert set(saved.states["guard"].values) == {"rate", "skipped", "returned", "stopped"}
    assert set(saved.states["optimizer"].values) == {*PPO_VALUES, "kl_beyond"}
    assert {name.split("/")[0] for name in saved.states["optimizer"].tensors} == {"policy", "critic", "average"}
    assert set(saved.states["generators"].values) | set(saved.states["generators"].tensors) >= {"python", "numpy", "torch"}
