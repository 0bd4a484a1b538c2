"""One stage: its optimizer's loop with checkpoints, its artifact, and the manifest that says what it was made of."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from alignkit.artifacts import Artifacts, facts
from alignkit.checkpoint import forget, save_artifact
from alignkit.config.schema import RunConfig, StageConfig
from alignkit.context import Context
from alignkit.errors import RunError
from alignkit.feed import read_feed
from alignkit.files import write_json
from alignkit.generators import Generators
from alignkit.guards.finite import not_finite
from alignkit.guards.guard import Guard, RollBack
from alignkit.guards.memory import is_out_of_memory
from alignkit.interfaces import Policy, Tracker
from alignkit.interrupt import StopRequest
from alignkit.journal import Journal
from alignkit.loops import offline, online
from alignkit.parts import build_parts
from alignkit.probes import probes
from alignkit.registry import Registry
from alignkit.rollout import LocalEngine
from alignkit.saving import Saves
from alignkit.scoring import Scoring
from alignkit.seeds import derived_seed
from alignkit.step_end import StepEnd
from alignkit.tracking import EventLog, MetricsFile, Terminal
from alignkit.types import Plan
from alignkit.world import Changes

_HEADLINES = {
    "demonstrations": ("loss/nll_nats",),
    "rankings": ("loss/ranking_nats", "reward/accuracy"),
    "rollouts": ("reward/score_mean", "kl/sequence_nats", "response/length_tokens", "policy/entropy_nats"),
}


class StageRunner:
    """Runs the stages of one run."""

    def __init__(
        self,
        run: RunConfig,
        registry: Registry,
        folder: Path,
        terminal: Terminal,
        events: EventLog,
        trackers: Sequence[Tracker],
        stop: StopRequest,
        changes: Changes,
    ) -> None:
        self._run, self._registry, self._folder = run, registry, folder
        self._terminal, self._events, self._trackers, self._stop, self._changes = terminal, events, trackers, stop, changes
        self._policy = registry.policy(run.policy.kind)
        self._artifacts = Artifacts(folder, self._policy, run.policy, terminal.say)

    def run(self, stage: StageConfig) -> None:
        """Do the stage, or say that it is done."""
        folder = self._folder / stage.name
        if (folder / "manifest.json").is_file():
            self._terminal.say(f"{stage.name}: done before")
            return
        folder.mkdir(exist_ok=True)
        self._events.append("stage started", stage=stage.name)
        started = time.monotonic()
        self._artifacts.begin()
        self._guard = Guard(stage.name, self._run.guard, repr(stage), self._terminal.say, self._events)
        with closing(Journal(folder / "rewards.db")) as self._journal:
            try:
                made = self._evaluate(stage, folder) if stage.evaluate else self._learn(stage, folder)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise RunError(_no_memory(stage.name, error)) from error
        write_json(folder / "manifest.json", {"stage": stage.name, **made, "seconds": round(time.monotonic() - started, 1)})
        # Only now: until the manifest is there, the last checkpoint is what a killed run goes on from.
        for scaffolding in ("checkpoints", "candidates"):
            shutil.rmtree(folder / scaffolding, ignore_errors=True)
        self._events.append("stage finished", stage=stage.name)

    def _evaluate(self, stage: StageConfig, folder: Path) -> dict[str, Any]:
        assert stage.evaluate is not None
        self._terminal.say(f"{stage.name}: evaluating")
        Generators(derived_seed(self._run.seed, stage.name))
        spec = self._registry.evaluator(stage.evaluate.kind)
        write_json(folder / "evaluation.json", dict(spec.build(stage.evaluate.config, self._context(stage, folder)).evaluate()))
        return {"kind": stage.evaluate.kind, "makes": "evaluation", "parents": self._artifacts.parents()}

    def _learn(self, stage: StageConfig, folder: Path) -> dict[str, Any]:
        """Optimize, and once more from before the first step that could not be taken, should the guard ask for it."""
        try:
            return self._optimize(stage, folder)
        except RollBack as back:
            first, last = back.first, back.last
        # Out here nothing holds what was built for the first attempt.
        forget(folder / "checkpoints", first)
        return self._optimize(stage, folder, passed=last)

    def _optimize(self, stage: StageConfig, folder: Path, *, passed: int = 0) -> dict[str, Any]:
        """``passed``: the rows up to this step are not fed again."""
        assert stage.optimizer is not None
        # Before anything is built, which may draw from them.
        generators = Generators(derived_seed(self._run.seed, stage.name))
        spec = self._registry.optimizer(stage.optimizer.kind)
        codec = self._policy.codec(self._run.policy.config, self._artifacts.folder(stage.start))
        feed = read_feed(self._registry, stage, spec.feed, codec)
        if border := feed.border():
            self._terminal.say(f"{stage.name}: {border}")
        plan = spec.plan(stage.optimizer.config, len(feed.rows))
        context = self._context(stage, folder, plan, feed.rows)
        optimizer = spec.build(stage.optimizer.config, context)
        if context.checks:
            # Before the reward source is asked for: it reads messages, and may write them in tokens of its own.
            self._artifacts.check_templates(feed.template_hash)
        parts = build_parts(stage, optimizer, context, feed, self._changes, self._load, generators)

        metrics = MetricsFile(folder / "metrics.jsonl")
        stateful, say = parts.stateful(), self._terminal.say
        saves = Saves(folder / "checkpoints", stateful, metrics, self._run.checkpoint, say, self._events, self._guard)
        first = self._resume(stage, plan, saves)
        if passed:
            parts.order.take((passed - first) * plan.rows)
            self._guard.returned()
        metrics.cut(first)
        with self._terminal.stage(stage.name, plan.steps, first, headline=_HEADLINES[spec.feed]) as progress:
            after = StepEnd(
                stage=stage,
                plan=plan,
                feed=feed,
                parts=parts,
                journal=self._journal,
                saves=saves,
                metrics=metrics,
                trackers=self._trackers,
                progress=progress,
                stop=self._stop,
            )
            after.begin(first + 1)
            if parts.reward is None or parts.watch is None:
                offline(parts.optimizer, feed.rows, parts.order, plan, first=first, after=after)
            else:
                scoring = Scoring(parts.reward, stateful, saves, first, say)
                policy, engine, remembered = parts.optimizer.policy, LocalEngine(self._run.seed, self._guard), scoring.remembering(after)
                online(parts.watch, policy, engine, scoring, feed.rows, parts.order, plan, first=first, after=remembered)

        if name := not_finite({"optimizer": parts.optimizer.state()}):
            self._guard.go_back(plan.steps, f"{name} is not finite", "the last of the stage")
        metrics.sync()
        artifact, selection = folder / spec.makes, parts.selection
        hashes = selection.take(artifact) if selection else save_artifact(artifact, parts.optimizer.save)
        return {
            "kind": spec.kind,
            "makes": spec.makes,
            "steps": plan.steps,
            **({"selection": selection.report()} if selection else {}),
            "parents": self._artifacts.parents(),
            "data": feed.report,
            "template_hash": feed.template_hash,
            "files": facts(hashes),
            "probes": probes(self._load(artifact), feed.rows) if spec.makes == "policy" else [],
        }

    def _resume(self, stage: StageConfig, plan: Plan, saves: Saves) -> int:
        """The number of steps done."""
        done = saves.resume()
        if done >= plan.steps:  # The plan has changed, and that was accepted.
            raise RunError(f"stage {stage.name} has done {done} steps, and now has {plan.steps}; give it more, or start anew with --fresh")
        if done:
            self._terminal.say(f"{stage.name}: continuing after step {done}")
            self._events.append("stage continued", stage=stage.name, step=done)
        return done

    def _load(self, artifact: Path) -> Policy:
        """A policy that was saved, to be looked at."""
        return self._policy.load(self._run.policy.config, artifact, False, self._run.seed)

    def _context(self, stage: StageConfig, folder: Path, plan: Plan | None = None, rows: Sequence[Any] = ()) -> Context:
        config, seed, artifact = self._run.policy.config, self._run.seed, self._artifacts.folder
        return Context(
            seed=seed,
            folder=folder,
            registry=self._registry,
            start=stage.start,
            reference=stage.reference or stage.start,
            plan=plan,
            rows=rows,
            checks=self._run.checks == "on",
            artifact=artifact,
            load_policy=lambda name, trainable: self._policy.load(config, artifact(name), trainable, seed),
            load_scalar=lambda name, trainable: self._policy.load_scalar(config, artifact(name), trainable, seed),
            journal=self._journal,
            guard=self._guard,
            say=self._terminal.say,
        )


def _no_memory(stage: str, error: BaseException) -> str:
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"stage {stage}: out of memory, where nothing takes less at once by itself as steps and rollouts do; lower microbatch_tokens, "
        "shorten the rows, train adapters (policy.tuning: {kind: lora}), or take a smaller model or a larger machine. "
        f"The same command goes on from what was saved. What was said: {said}"
    )
