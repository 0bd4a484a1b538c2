"""A plugin's settings taken through a real config file: written as YAML into the smallest run that may hold them, and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, get_args

from alignkit.errors import AlignkitError
from alignkit.interfaces import (
    Artifact,
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

_DATA_STAGE = {"optimizer": {"kind": f"{FILLER}_policy"}, "data": {"kind": FILLER}}
_ROLLOUT_STAGE = {"optimizer": {"kind": f"{FILLER}_rollouts"}, "prompts": {"kind": FILLER}, "reward": {"kind": FILLER}}


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


def parsed(
    interface: type, kind: str, settings: Mapping[str, Any], registry: Registry, earlier: Mapping[str, Artifact] = MappingProxyType({})
) -> Any:
    """The validated dataclass that a config file with ``{kind: kind, **settings}`` makes. Raises ``AlignkitError``.

    ``earlier``: stages that come before, with what each makes, for settings that refer to one.
    """
    import yaml

    from alignkit.config import load_config

    part = {"kind": kind, **settings}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "conformance.yaml"
        path.write_text(yaml.safe_dump(_run(interface, part, registry, earlier), allow_unicode=True, sort_keys=False), encoding="utf-8")
        run = load_config(path, (), _with_fillers(registry)).run
    stage = run.stages[-1]
    places: dict[type, Any] = {
        Policy: run.policy,
        RewardSource: stage.reward,
        Optimizer: stage.optimizer,
        DataSource: stage.data,
        Evaluator: stage.evaluate,
        Tracker: (*run.trackers, None)[0],
    }
    return places[interface].config


def refusal(
    interface: type, kind: str, settings: Mapping[str, Any], registry: Registry, earlier: Mapping[str, Artifact] = MappingProxyType({})
) -> str | None:
    """The message with which a config file with these settings is refused; None when it is accepted."""
    try:
        parsed(interface, kind, settings, registry, earlier)
    except AlignkitError as error:
        return str(error)
    return None


def _run(interface: type, part: Mapping[str, Any], registry: Registry, earlier: Mapping[str, Artifact]) -> dict[str, Any]:
    """The smallest run with ``part`` in its place, which is in the last stage if it is in a stage."""
    last = {"name": "conformance_stage", **_parts_of_stage(interface, part, registry)}
    run: dict[str, Any] = {
        "name": "conformance",
        "policy": part if interface is Policy else {"kind": "tiny_lm"},
        "stages": [*({"name": name, **_DATA_STAGE, "optimizer": {"kind": f"{FILLER}_{makes}"}} for name, makes in earlier.items()), last],
    }
    return {**run, "trackers": [part]} if interface is Tracker else run


def _parts_of_stage(interface: type, part: Mapping[str, Any], registry: Registry) -> dict[str, Any]:
    if interface is DataSource:
        return {**_DATA_STAGE, "data": part}
    if interface is RewardSource:
        return {**_ROLLOUT_STAGE, "reward": part}
    if interface is Evaluator:
        return {"evaluate": part}
    if interface is Optimizer:
        return {**(_ROLLOUT_STAGE if registry.optimizer(part["kind"]).feed == "rollouts" else _DATA_STAGE), "optimizer": part}
    return _DATA_STAGE


def _with_fillers(registry: Registry) -> Registry:
    """The registry, and parts that do nothing to stand around the one that is looked at."""
    optimizers: list[tuple[str, Feed, Artifact]] = [(makes, "demonstrations", makes) for makes in get_args(Artifact)]
    optimizers.append(("rollouts", "rollouts", "policy"))
    specs: dict[type, tuple[Spec, ...]] = {
        RewardSource: (RewardSpec(kind=FILLER, summary="", config=_Nothing, build=lambda config, context: CountingReward()),),
        DataSource: (DataSpec(kind=FILLER, summary="", config=_Nothing, build=lambda config: ListSource([])),),
        Optimizer: tuple(
            OptimizerSpec(
                kind=f"{FILLER}_{name}", summary="", config=_Nothing, feed=feed, makes=makes, plan=_plan, build=lambda config, context: None
            )
            for name, feed, makes in optimizers
        ),
    }
    return Registry((*registry.plugins, PluginInfo(FILLER, "alignkit.testing", "", specs)), registry.failures)


def _plan(config: _Nothing, rows: int) -> Plan:
    return Plan(steps=1, rows=1, sampling=Sampling(max_new_tokens=1))
