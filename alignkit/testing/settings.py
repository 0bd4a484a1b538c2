"""A plugin's settings taken through a real config file: written as YAML into the smallest run that may hold them, and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from alignkit.errors import AlignkitError
from alignkit.interfaces import (
    DataSource,
    DataSpec,
    Evaluator,
    Feed,
    Optimizer,
    OptimizerSpec,
    Policy,
    RewardSource,
    RewardSpec,
    Spec,
    Tracker,
)
from alignkit.registry import PluginInfo, Registry
from alignkit.settings import Component
from alignkit.testing.fakes import CountingReward, ListSource
from alignkit.types import Plan, Sampling

FILLER = "conformance_filler"
"""The kind of the parts around the one that is looked at."""


@dataclass(frozen=True)
class _Nothing:
    """No settings."""


def plain(config: Any) -> Any:
    """A config dataclass as a config file would write it: mappings, lists and plain values."""
    if isinstance(config, Component):
        return {"kind": config.kind, **plain(config.config)}
    if is_dataclass(config):
        return {field.name: plain(getattr(config, field.name)) for field in fields(config)}
    if isinstance(config, tuple):
        return [plain(item) for item in config]
    return config


def parsed(interface: type, kind: str, settings: Mapping[str, Any], registry: Registry) -> Any:
    """The validated dataclass that a config file with ``{kind: kind, **settings}`` makes. Raises ``AlignkitError``."""
    import yaml

    from alignkit.config import load_config

    part = {"kind": kind, **settings}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "conformance.yaml"
        path.write_text(yaml.safe_dump(_run(interface, part, registry), allow_unicode=True, sort_keys=False), encoding="utf-8")
        run = load_config(path, (), _with_fillers(registry)).run
    stage = run.stages[0]
    places: dict[type, Any] = {
        Policy: run.policy,
        RewardSource: stage.reward,
        Optimizer: stage.optimizer,
        DataSource: stage.data,
        Evaluator: stage.evaluate,
        Tracker: (*run.trackers, None)[0],
    }
    return places[interface].config


def refusal(interface: type, kind: str, settings: Mapping[str, Any], registry: Registry) -> str | None:
    """The message with which a config file with these settings is refused; None when it is accepted."""
    try:
        parsed(interface, kind, settings, registry)
    except AlignkitError as error:
        return str(error)
    return None


def _run(interface: type, part: Mapping[str, Any], registry: Registry) -> dict[str, Any]:
    """The smallest run with ``part`` in its place."""
    filler = {"kind": FILLER}
    stage: dict[str, Any] = {"name": "first", "optimizer": {"kind": f"{FILLER}_demonstrations"}, "data": filler}
    run: dict[str, Any] = {"name": "conformance", "policy": {"kind": "tiny_lm"}, "stages": [stage]}
    if interface is Policy:
        run["policy"] = part
    elif interface is Tracker:
        run["trackers"] = [part]
    elif interface is DataSource:
        stage["data"] = part
    elif interface is RewardSource:
        run["stages"] = [_rollout_stage({"kind": f"{FILLER}_rollouts"}, part)]
    elif interface is Evaluator:
        run["stages"] = [{"name": "first", "evaluate": part}]
    elif registry.optimizer(part["kind"]).feed == "rollouts":
        run["stages"] = [_rollout_stage(part, filler)]
    else:
        stage["optimizer"] = part
    return run


def _rollout_stage(optimizer: Mapping[str, Any], reward: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": "first", "optimizer": optimizer, "prompts": {"kind": FILLER}, "reward": reward}


def _with_fillers(registry: Registry) -> Registry:
    """The registry, and parts that do nothing to stand around the one that is looked at."""
    feeds: tuple[Feed, ...] = ("demonstrations", "rollouts")
    specs: dict[type, tuple[Spec, ...]] = {
        RewardSource: (RewardSpec(kind=FILLER, summary="", config=_Nothing, build=lambda config, context: CountingReward()),),
        DataSource: (DataSpec(kind=FILLER, summary="", config=_Nothing, build=lambda config: ListSource([])),),
        Optimizer: tuple(
            OptimizerSpec(kind=f"{FILLER}_{feed}", summary="", config=_Nothing, feed=feed, plan=_plan, build=lambda config, context: None)
            for feed in feeds
        ),
    }
    return Registry((*registry.plugins, PluginInfo(FILLER, "alignkit.testing", "", specs)), registry.failures)


def _plan(config: _Nothing, rows: int) -> Plan:
    return Plan(steps=1, rows=1, sampling=Sampling(max_new_tokens=1))
