"""One stage: its optimizer's loop with checkpoints, its artifact, and the manifest that says what it was made of."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from alignkit.checkpoint import forget, save_artifact, verify
from alignkit.checks import same_template
from alignkit.config.schema import RunConfig, StageConfig
from alignkit.context import Context
from alignkit.data.collate import collate
from alignkit.data.order import Order
from alignkit.errors import RunError, Stopped
from alignkit.feed import Feed, read_feed
from alignkit.files import FileHash, hash_folder, read_json, sha256, write_json
from alignkit.generators import Generators
from alignkit.guards.finite import not_finite
from alignkit.guards.guard import Guard, RollBack
from alignkit.guards.holdout import Holdout
from alignkit.guards.watch import Watch
from alignkit.interfaces import RewardSource, Stateful, Tracker
from alignkit.interrupt import StopRequest
from alignkit.journal import Journal
from alignkit.loops import After, offline, online
from alignkit.registry import Registry
from alignkit.rollout import LocalEngine
from alignkit.saving import Saves
from alignkit.scoring import Scoring
from alignkit.seeds import derived_seed
from alignkit.selection import Judge, Selection, by_loss, by_reward
from alignkit.tracking import EventLog, MetricsFile, StageProgress, Terminal
from alignkit.types import Metrics, Plan, PromptRow, TokenRow
from alignkit.world import Changes, Inputs

_PROBES = 4
_HEADLINES = {
    "demonstrations": ("loss/nll_nats",),
    "rankings": ("loss/ranking_nats", "reward/accuracy"),
    "rollouts": ("reward/score_mean", "kl/sequence_nats", "response/length_tokens", "policy/entropy_nats"),
}


class StageRunner:
    """Runs the stages of one run, and knows where each finished one left its artifact."""

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
        self._used: set[str] = set()
        self._verified: set[Path] = set()

    def run(self, stage: StageConfig) -> None:
        """Do the stage, or say that it is done."""
        folder = self._folder / stage.name
        if (folder / "manifest.json").is_file():
            self._terminal.say(f"{stage.name}: done before")
            return
        folder.mkdir(exist_ok=True)
        self._used.clear()
        self._events.append("stage started", stage=stage.name)
        started = time.monotonic()
        self._guard = Guard(stage.name, self._run.guard, repr(stage.optimizer), self._terminal.say, self._events)
        with closing(Journal(folder / "rewards.db")) as self._journal:
            facts = self._evaluate(stage, folder) if stage.evaluate else self._guarded(stage, folder)
        write_json(folder / "manifest.json", {"stage": stage.name, **facts, "seconds": round(time.monotonic() - started, 1)})
        # Only now: until the manifest is there, the last checkpoint is what a killed run goes on from.
        for scaffolding in ("checkpoints", "candidates"):
            shutil.rmtree(folder / scaffolding, ignore_errors=True)
        self._events.append("stage finished", stage=stage.name)

    def artifact(self, stage: str | None) -> Path:
        """The folder of a finished stage's policy or reward model; None: the run's own model, prepared on first use.

        What the run wrote is checked against the hashes it was written with. Raises ``CheckpointError`` when a file has changed.
        """
        if stage is None:
            folder, hashes = self._own_model()
        else:
            self._used.add(stage)
            manifest = read_json(self._folder / stage / "manifest.json")
            folder, hashes = self._folder / stage / manifest["makes"], manifest["files"]
        if folder not in self._verified and folder.is_relative_to(self._folder):
            verify(folder, {name: FileHash(**facts) for name, facts in hashes.items()})
            self._verified.add(folder)
        return folder

    def _own_model(self) -> tuple[Path, dict[str, Any]]:
        note = self._folder / "model.json"
        if not note.is_file():
            self._terminal.say("reading the model")
            path = self._policy.prepare(self._run.policy.config, self._folder / "model")
            # Inside the run's folder it is known by its place there, so that the folder can be moved.
            known = path.relative_to(self._folder) if path.is_relative_to(self._folder) else path.resolve()
            write_json(note, {"path": str(known), "files": _facts(hash_folder(path))})
        facts = read_json(note)
        return self._folder / facts["path"], facts["files"]

    def _evaluate(self, stage: StageConfig, folder: Path) -> dict[str, Any]:
        assert stage.evaluate is not None
        self._terminal.say(f"{stage.name}: evaluating")
        Generators(derived_seed(self._run.seed, stage.name))
        spec = self._registry.evaluator(stage.evaluate.kind)
        write_json(folder / "evaluation.json", dict(spec.build(stage.evaluate.config, self._context(stage, folder)).evaluate()))
        return {"kind": stage.evaluate.kind, "makes": "evaluation", "parents": self._parents()}

    def _guarded(self, stage: StageConfig, folder: Path) -> dict[str, Any]:
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
        codec = self._policy.codec(self._run.policy.config, self.artifact(stage.start))
        feed = read_feed(self._registry, stage, spec.feed, codec)
        if merged := feed.report["training"]["merged"]:
            self._terminal.say(
                f"{stage.name}: in {merged} of {len(feed.rows)} rows the end of the prompt and the beginning of the completion are one "
                "token, which no rollout will hold; let completions begin with the blank (the manifest names the rows)"
            )
        plan = spec.plan(stage.optimizer.config, len(feed.rows))
        order = Order(len(feed.rows), self._run.seed, stage.name)
        context = self._context(stage, folder, plan, feed.rows)
        optimizer = spec.build(stage.optimizer.config, context)
        if context.checks:
            # Before the reward source is asked for: it reads messages, and may write them in tokens of its own.
            self._check_templates(codec.template_hash)
        reward = context.build_reward(stage.reward) if stage.reward else None

        judge = context.build_reward(stage.select.reward) if stage.select and stage.select.reward else None
        selection = self._selection(stage, folder, context, judge)
        opinion = context.build_reward(stage.watch.reward) if stage.watch else None
        holdout = Holdout(stage.watch, opinion, optimizer.policy, context) if stage.watch and opinion else None
        watch = Watch(optimizer, self._guard, holdout) if reward else None
        inputs = Inputs(stage.name, {**feed.hashes(), "template_hash": codec.template_hash, **context.read}, self._changes)
        # In the order of loading. The generators are the last: whatever loads may draw from them.
        parts = {"inputs": inputs, "guard": self._guard, "optimizer": optimizer, "order": order, "reward": reward, "selection": selection}
        parts |= {"judge": judge, "opinion": opinion, "watch": watch}
        stateful = {name: part for name, part in (*parts.items(), ("generators", generators)) if isinstance(part, Stateful)}
        metrics = MetricsFile(folder / "metrics.jsonl")
        saves = Saves(folder / "checkpoints", stateful, metrics, self._run.checkpoint, self._terminal.say, self._events, self._guard)
        first = self._resume(stage, plan, saves)
        if passed:
            order.take((passed - first) * plan.rows)
            self._guard.returned()
        self._journal.begin(first + 1)
        self._guard.begin(first + 1)
        metrics.cut(first)
        with self._terminal.stage(stage.name, plan.steps, first, headline=_HEADLINES[spec.feed]) as progress:
            after = self._after(stage, plan, optimizer, order, selection, saves, feed, metrics, progress)
            if reward is None or watch is None:
                offline(optimizer, feed.rows, order, plan, first=first, after=after)
            else:
                engine = LocalEngine(self._run.seed)
                scoring = Scoring(reward, stateful, saves, first, self._terminal.say)
                after = scoring.remembering(after)
                online(watch, optimizer.policy, engine, scoring, feed.rows, order, plan, first=first, after=after)

        if name := not_finite({"optimizer": optimizer.state()}):
            self._guard.go_back(plan.steps, f"{name} is not finite", "the last of the stage")
        metrics.sync()
        artifact = folder / spec.makes
        hashes = selection.take(artifact) if selection else save_artifact(artifact, optimizer.save)
        return {
            "kind": spec.kind,
            "makes": spec.makes,
            "steps": plan.steps,
            **({"selection": selection.report()} if selection else {}),
            "parents": self._parents(),
            "data": feed.report,
            "template_hash": codec.template_hash,
            "files": _facts(hashes),
            "probes": self._probes(artifact, feed) if spec.makes == "policy" else [],
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

    def _selection(self, stage: StageConfig, folder: Path, context: Context, reward: RewardSource | None) -> Selection | None:
        if stage.select is None:
            return None
        config, seed = self._run.policy.config, self._run.seed
        judge: Judge = by_loss
        if reward is not None:
            judge = by_reward(stage.select, context, reward, lambda candidate: self._policy.load(config, candidate, False, seed))
        return Selection(folder / "candidates", judge)

    def _after(
        self,
        stage: StageConfig,
        plan: Plan,
        optimizer: Any,
        order: Order,
        selection: Selection | None,
        saves: Saves,
        feed: Feed,
        file: MetricsFile,
        progress: StageProgress,
    ) -> After:
        """What follows each step: validation and checkpoint when due, the figures to everyone, and a stop if one was asked for."""

        def after(step: int, metrics: Metrics) -> None:
            last = step == plan.steps
            if last or (stage.validate_every and step % stage.validate_every == 0):
                held_out = optimizer.validate(feed.validation) if feed.validation else {}
                metrics = {**metrics, **{f"validation/{name.replace('/', '_')}": value for name, value in held_out.items()}}
                if selection:
                    metrics = {**metrics, **selection.consider(step, held_out, optimizer.save)}
            file.log(stage.name, step, metrics)
            for tracker in self._trackers:
                tracker.log(stage.name, step, metrics)
            progress.advance(step, metrics)
            self._guard.settle(metrics.get("guard/skipped_steps", 0.0), [_row_id(feed.rows[i]) for i in order.last])
            if self._guard.stopped:
                saves.final(step)
                best = f"; the best weights so far are in {selection.best}" if selection and selection.best else ""
                raise Stopped(f"stage {stage.name} is stopped and saved after step {step} of {plan.steps}: {self._guard.stopped}{best}")
            self._journal.begin(step + 1)
            self._guard.begin(step + 1)
            if last:
                return  # the artifact follows
            if self._stop.signal:
                saves.final(step)
                self._stop.check(f"stage {stage.name} is saved after step {step} of {plan.steps}")
            elif saves.due():
                saves.attempt(step)

        return after

    def _context(self, stage: StageConfig, folder: Path, plan: Plan | None = None, rows: Sequence[Any] = ()) -> Context:
        config, seed = self._run.policy.config, self._run.seed
        return Context(
            seed=seed,
            folder=folder,
            registry=self._registry,
            start=stage.start,
            reference=stage.reference or stage.start,
            plan=plan,
            rows=rows,
            checks=self._run.checks == "on",
            artifact=self.artifact,
            load_policy=lambda name, trainable: self._policy.load(config, self.artifact(name), trainable, seed),
            load_scalar=lambda name, trainable: self._policy.load_scalar(config, self.artifact(name), trainable, seed),
            journal=self._journal,
            guard=self._guard,
            say=self._terminal.say,
        )

    def _parents(self) -> dict[str, str]:
        """The hash of the manifest of each stage that this one asked for."""
        return {name: sha256(self._folder / name / "manifest.json") for name in sorted(self._used)}

    def _check_templates(self, here: str) -> None:
        """Whatever else this stage has asked for reads the policy's tokens: it must write a conversation in the same ones."""
        for name in sorted(self._used):
            same_template(here, read_json(self._folder / name / "manifest.json")["template_hash"], name)

    def _probes(self, artifact: Path, feed: Feed) -> list[dict[str, Any]]:
        """A few sequences with their log-probabilities under the saved policy: whoever loads it later can compare."""
        policy = self._policy.load(self._run.policy.config, artifact, False, self._run.seed)
        ids = [tuple(row.ids) for row in feed.rows[:_PROBES]]
        batch = collate([TokenRow(str(i), row, (False,) + (True,) * (len(row) - 1)) for i, row in enumerate(ids)])
        with torch.no_grad():
            logprobs = policy.score_tokens(batch).logprobs
        return [{"ids": list(row), "logprobs": logprobs[i, 1 : len(row)].tolist()} for i, row in enumerate(ids)]


def _row_id(row: Any) -> str:
    return row.prompt.id if isinstance(row, PromptRow) else str(row.id)


def _facts(hashes: Mapping[str, FileHash]) -> dict[str, Any]:
    return {name: asdict(found) for name, found in hashes.items()}
