"""The conformance tests of optimizers: they run on a tiny random model, a few rows and three updates."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignkit.context import Context
from alignkit.interfaces import Feed, Optimizer, OptimizerSpec, Policy, Rollout, ScoredRollout, State
from alignkit.testing.conformance import Conformance, assert_plain_values
from alignkit.testing.fakes import CountingReward, make_context
from alignkit.testing.imports import HEAVY, run_fresh
from alignkit.testing.settings import plain
from alignkit.types import Message, Metrics, Prompt, RankedRows, Sample

_PLAN = f"""
import json, sys
from alignkit.interfaces import Optimizer
from alignkit.registry import find_plugins
from alignkit.testing.settings import parsed
kind, settings, earlier = json.loads(sys.argv[1])
registry = find_plugins()
registry.optimizer(kind).plan(parsed(Optimizer, kind, settings, registry, earlier), 100)
heavy = sorted(set({HEAVY!r}) & set(sys.modules))
if heavy: sys.exit("plan imports " + ", ".join(heavy) + "; `alignkit check` calls it and must stay fast")
"""


class OptimizerConformance(Conformance):
    """What every optimizer must do. Keep ``config`` small: the tests take a handful of updates on four rows."""

    interface = Optimizer
    spec: OptimizerSpec

    def build(self, folder: Path) -> tuple[Any, Context]:
        """The optimizer, on a tiny model, and its surroundings."""
        context = make_context(folder, registry=self.registry(), plan=self.spec.plan(self.config, 16))
        # The rollouts of the tests are all of the starting policy, also when the optimizer's has moved on: a run would be stopped for it.
        context = replace(context, checks=False)
        if self.spec.feed != "rollouts":
            context = replace(context, rows=[row for batch in self.batches(context) for row in batch])
        return self.spec.build(self.config, context), context

    def batches(self, context: Context) -> list[Any]:
        """Three different batches of what the optimizer is fed with."""
        policy = context.load_policy(context.start, False)
        return [example_batch(self.spec.feed, policy, number) for number in range(3)]

    def test_the_plan_asks_for_something(self) -> None:
        """Steps and rows are positive, and an optimizer that learns from rollouts says how they are drawn."""
        for rows in (1, 7, 1000):
            plan = self.spec.plan(self.config, rows)
            assert min(plan.steps, plan.rows, plan.samples_per_prompt) > 0, f"{plan} for {rows} rows"
            assert (plan.sampling is not None) == (self.spec.feed == "rollouts"), f"fed with {self.spec.feed}, sampling {plan.sampling}"

    def test_the_plan_is_made_without_torch(self) -> None:
        """``alignkit check`` shows the plan in an instant."""
        run_fresh(_PLAN, json.dumps([self.spec.kind, plain(self.config), dict(self.earlier)]))

    def test_an_update_learns_and_says_so_in_finite_figures(self, tmp_path: Path) -> None:
        """Metrics are named ``area/name`` and finite, and the state has changed."""
        optimizer, context = self.build(tmp_path)
        before = _copy(optimizer.state())
        metrics = optimizer.update(self.batches(context)[0])
        assert metrics, "update returned no metrics"
        for name, value in metrics.items():
            assert "/" in name, f"the metric {name!r} is not named area/name"
            assert math.isfinite(value), f"the metric {name} is {value}"
        assert _difference(before, optimizer.state()), "an update changed nothing in the state"

    def test_a_loaded_state_continues_on_the_same_trajectory(self, tmp_path: Path) -> None:
        """Update, save, two more updates; a new optimizer that loads the state and takes the two arrives at the same place.

        The global random generators are part of a checkpoint; a generator of the optimizer's own has to be in its state.
        """
        from alignkit.generators import Generators

        generators = Generators(0)
        straight, context = self.build(tmp_path)
        first, *rest = self.batches(context)
        straight.update(first)
        saved, drawn = _copy(straight.state()), generators.state()
        assert_plain_values(saved)
        expected = [_timeless(straight.update(batch)) for batch in rest]

        resumed, _ = self.build(tmp_path)
        resumed.load_state(saved)
        generators.load_state(drawn)
        difference = _difference(saved, resumed.state())
        assert not difference, f"state() after load_state(saved) is not what was saved: {difference}"
        metrics = [_timeless(resumed.update(batch)) for batch in rest]
        assert metrics == expected, f"the metrics were {expected}, and after loading {metrics}"
        difference = _difference(straight.state(), resumed.state())
        assert not difference, f"two updates after loading lead elsewhere: {difference}"

    def test_validation_measures_and_changes_nothing(self, tmp_path: Path) -> None:
        """For an optimizer fed with data; one that learns from rollouts has no ``validate``."""
        if self.spec.feed == "rollouts":
            return
        optimizer, context = self.build(tmp_path)
        before = _copy(optimizer.state())
        metrics = optimizer.validate(self.batches(context)[0])
        assert all(math.isfinite(value) for value in metrics.values()), metrics
        assert not _difference(before, optimizer.state()), "validate changed the state"

    def test_the_artifact_is_written_as_safetensors(self, tmp_path: Path) -> None:
        """``save`` writes a folder that holds weights and a model's config, and nothing pickled."""
        optimizer, _ = self.build(tmp_path)
        target = tmp_path / "artifact"
        optimizer.save(target)
        names = {path.name for path in target.rglob("*") if path.is_file()}
        assert any(name.endswith(".safetensors") for name in names), names
        assert "config.json" in names, names
        assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))], names


def example_batch(feed: Feed, policy: Policy, number: int = 0) -> Any:
    """Four short rows of what an optimizer is fed with; each ``number`` makes another batch. Rollouts count the letter e as reward."""
    codec = policy.codec
    samples = [
        Sample(Prompt(f"{number}.{i}", (Message("user", f"Say {word}."),)), f"{word} " * (i % 2 + 1), index=0)
        for i, word in enumerate(("one", "eleven", "seventeen", "four"), start=number)
    ]
    if feed == "demonstrations":
        return [codec.sample(sample) for sample in samples]
    if feed == "rankings":
        worse = [Sample(sample.prompt, "no", index=1) for sample in samples]
        pairs = zip(samples, worse, strict=True)
        return [RankedRows(good.prompt.id, (codec.sample(good), codec.sample(bad)), ranks=(1, 2)) for good, bad in pairs]
    return ScoredRollout(_rollout(policy, samples), tuple(CountingReward("e").score(samples)))


def _rollout(policy: Policy, samples: list[Sample]) -> Rollout:
    """The samples as if ``policy`` had drawn them at temperature 1."""
    import torch

    from alignkit.data.collate import collate

    batch = collate([policy.codec.sample(sample) for sample in samples])
    with torch.no_grad():
        logprobs = policy.score_tokens(batch).logprobs
    return Rollout(tuple(samples), batch, logprobs.cpu(), exact=True, policy_version=policy.version)


def _timeless(metrics: Metrics) -> dict[str, float]:
    """The figures that do not depend on the clock."""
    return {name: value for name, value in metrics.items() if not name.startswith("time/")}


def _copy(state: State) -> State:
    """A snapshot that later updates cannot reach."""
    return State({name: tensor.detach().clone() for name, tensor in state.tensors.items()}, copy.deepcopy(dict(state.values)))


def _difference(left: State, right: State) -> str:
    """The first thing in which two states differ, or nothing."""
    import torch

    if set(left.tensors) != set(right.tensors):
        return f"tensors: {sorted(set(left.tensors) ^ set(right.tensors))}"
    for name, tensor in left.tensors.items():
        if not torch.equal(tensor, right.tensors[name]):
            return f"tensor {name}"
    return "" if left.values == right.values else f"values: {left.values} and {right.values}"
