"""The end of a round: measures the candidate, and has the server record the round and promote where nothing speaks against it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from alignkit.api import Component, Context, RewardSource, Rollout, RunError
from alignkit.evaluate.statistics import without_nan
from alignkit.evaluate.win_rate import Comparison, WinRate, sequence_kl, values
from alignkit.files import read_json
from alignkit.models.causal_lm import load, resolve_precision
from alignkit.models.config import TuningConfig
from alignkit_serve.artifact import locate, read_content
from alignkit_serve.client import Client
from alignkit_serve.gate import GateConfig


class Gate:
    """Compares a stage's policy with the one that the run began with, which must be what the server still answers with."""

    def __init__(self, config: GateConfig, context: Context) -> None:
        self._config, self._context = config, context
        self._server = Client(config.server, os.environ.get(config.key_env))

    def evaluate(self) -> Mapping[str, Any]:
        """The comparison's figures and what became of the candidate. Raises ``AlignkitError`` where the server does not take part."""
        folder = self._context.artifact(self._config.candidate)
        parent, child = policy_id(self._context.artifact(None)), policy_id(folder)
        note = self._context.folder.parent / "run.json"
        run = read_json(note)["config"]
        rounds = self._server.rounds()
        if done := next((one for one in rounds if (one["name"], one["child_policy_id"]) == (run["name"], child)), None):
            # Killed after the server had been told, and before that was noted here.
            return {"candidate": self._config.candidate, **done["metrics"], "promoted": done["promoted"], "round": done["id"]}
        policies = {one["id"]: one for one in self._server.policies()}
        check_live(policies.values(), parent, self._config.server)

        comparison = WinRate(self._config, self._context).compare()
        figures = comparison.figures | self._measured(comparison, policies[first_policy(rounds, parent)]["path"])
        reasons = refusals(figures, self._config)
        staged = self._server.stage(folder)
        numbers = {name: figure for name, figure in figures.items() if isinstance(figure, int | float)}
        recorded = self._server.record_round({
            "name": run["name"],
            "config_sha256": hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest(),
            "git_sha": git_sha(),
            "parent_policy_id": parent,
            "child_policy_id": staged["id"],
            "promote": not reasons,
            "exports": self._server.export_ids(exports_of(run)),
            "metrics": numbers | {"agreement": self._server.agreement()["agreement"], "refused_because": "; ".join(reasons)},
            "started_at": datetime.fromtimestamp(note.stat().st_mtime, UTC).isoformat(),
            "finished_at": datetime.now(UTC).isoformat(),
        })  # fmt: skip
        self._context.say(f"{staged['name']} is {'live' if not reasons else 'refused: ' + '; '.join(reasons)}")
        return figures | {"promoted": not reasons, "refused_because": reasons, "policy": staged["name"], "round": recorded["id"]}

    def _measured(self, comparison: Comparison, first: str) -> dict[str, Any]:
        """What a win rate does not say: how far the policy has come since the first round, other scores, and the share of toxic answers."""
        artifact = locate(Path(first))
        origin = load(
            artifact.folder,
            tuning=TuningConfig(),
            precision=resolve_precision(artifact.precision),
            trainable=False,
            seed=self._context.seed,
        )
        kl = sequence_kl(comparison.candidate, origin, comparison.after.batch, self._config.temperature)
        figures = {"kl_first_nats": float(kl.mean())}
        for when, rollout in (("before", comparison.before), ("after", comparison.after)):
            if self._config.reward:
                figures[f"reward_mean_{when}"] = float(np.nanmean(self._scores(self._config.reward, rollout)))
            if self._config.toxicity:
                figures[f"toxic_share_{when}"] = float((self._scores(self._config.toxicity, rollout) < 0).mean())
        return without_nan(figures)

    def _scores(self, component: Component[RewardSource], rollout: Rollout) -> Any:
        return values(self._context.build_reward(component), rollout.samples)


def refusals(figures: Mapping[str, Any], config: GateConfig) -> list[str]:
    """What speaks against a candidate, with the figure and what is allowed; nothing: it may be promoted.

    A figure that could not be computed speaks against it.
    """
    low, kl, win = figures["ci95_low"], figures["kl_sequence_nats"], figures["win_rate"]
    reasons = []
    if low is None or not low > config.win_rate_low:
        found = "no pair of answers could be judged" if low is None else f"it wins {win:.3f}, with 95% confidence at least {low:.3f}"
        reasons.append(f"{found}; needed: more than {config.win_rate_low:g}")
    if kl is None or not kl <= config.kl_max:
        found = "its distance from the live policy is not a number" if kl is None else f"it is {kl:.1f} nats from the live policy"
        reasons.append(f"{found}; allowed: {config.kl_max:g}")
    if config.toxicity:
        before, after = figures["toxic_share_before"], figures["toxic_share_after"]
        if not after <= before + config.toxicity_rise:
            reasons.append(
                f"{after:.1%} of its answers are toxic, and {before:.1%} of the live policy's; allowed: {config.toxicity_rise:.1%} more"
            )
    return reasons


def check_live(policies: Iterable[Mapping[str, Any]], parent: str, server: str) -> None:
    """Whether the server still answers with the policy that the run began with. Raises ``RunError`` where it does not."""
    live = next((one for one in policies if one["state"] == "live"), None)
    if live is None or live["id"] != parent:
        found = live["name"] if live else "nothing"
        raise RunError(
            f"{server} answers with {found}, and this run began with {parent}: the candidate would be compared with a policy that nobody "
            "is given any more; roll back (alignkit rollback), or start a new round from what is live"
        )


def first_policy(rounds: Sequence[Mapping[str, Any]], policy: str) -> str:
    """Where the chain of promoted rounds that leads to ``policy`` began."""
    parents = {one["child_policy_id"]: one["parent_policy_id"] for one in rounds if one["promoted"]}
    seen = {policy}
    # A policy that was rolled back to may be its own ancestor.
    while (before := parents.get(policy)) is not None and before not in seen:
        seen.add(policy := before)
    return policy


def exports_of(config: Any) -> set[str]:
    """The names of the exports that a run's config reads, wherever in it."""
    if isinstance(config, list):
        return {name for each in config for name in exports_of(each)}
    if not isinstance(config, dict):
        return set()
    own = {config["export"]} if config.get("kind") == "feedback" else set()
    return own | {name for each in config.values() for name in exports_of(each)}


def policy_id(folder: Path) -> str:
    """The id under which a server knows the policy in ``folder``."""
    return read_content(locate(folder)).version


def git_sha() -> str | None:
    """The commit that the run's config lies in; None outside of a repository, or without git."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
