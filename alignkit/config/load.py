"""A config file and its overrides as a validated ``RunConfig``, or all that is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from alignkit.config.document import Key, override, read, resolve
from alignkit.config.schema import RunConfig, StageConfig
from alignkit.config.validate import WRONG, Validator
from alignkit.errors import ConfigError
from alignkit.interfaces import Optimizer, OptimizerSpec
from alignkit.registry import Registry

_ONLY_WITH_OPTIMIZER = ("data", "validation", "prompts", "reward", "start", "reference", "select", "watch")
_DIR = next(f for f in fields(RunConfig) if f.name == "dir")
_FOLDERS = ("model",)
"""What a run's folder holds besides the stages' folders, under a name that a stage could have."""


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A validated config. ``resolved``: every value, defaults filled in; ``origins``: dotted key -> who wrote it."""

    run: RunConfig
    path: Path
    resolved: dict[str, Any]
    origins: dict[str, str]


def load_config(path: str | Path, overrides: Sequence[str], registry: Registry) -> LoadedConfig:
    """Read and check everything. Raises ``ConfigError`` with all problems, in the order of the file."""
    document = read(Path(path))
    problems = [problem for text in overrides if (problem := override(document, text))]
    if "name" in document.values:
        # The one default that follows from another key; without a name, that the name is missing says it all.
        document.values.setdefault("dir", _DIR.default)
    problems += resolve(document)
    checked = Validator(document, registry)
    if "dir" in document.values and ("dir",) not in document.places and ("dir",) not in document.overridden:
        checked.defaults.add(("dir",))
    run = _run(checked)
    problems += [message for _, _, message in sorted(checked.problems) if message not in problems]
    if problems:
        raise ConfigError(problems)
    return LoadedConfig(run, Path(path), _nested(checked.resolved), _origins(checked))


def _run(checked: Validator) -> Any:
    """The stages one after another, each knowing those before it; then the whole."""
    values = checked.document.values
    stages = values.get("stages")
    made: dict[str, str] = {}
    if isinstance(stages, list):
        if not stages:
            checked.report(("stages",), "stages is empty; a run has at least one")
        for i, stage in enumerate(stages):
            _check_stage(checked, stage, ("stages", i), made)
    if checked.problems:
        # What is wrong inside stages was found with the names that each may refer to; look at the rest without them.
        checked.dataclass(RunConfig, {**values, "stages": []} if isinstance(stages, list) else values, ())
        return WRONG
    checked.earlier = made
    checked.resolved.clear()
    return checked.dataclass(RunConfig, values, ())


def _check_stage(checked: Validator, stage: Any, key: Key, made: dict[str, str]) -> None:
    """One stage: its own keys, then what they mean together. ``made``: what each earlier stage makes, to which this one is added."""
    checked.earlier = dict(made)
    config = checked.dataclass(StageConfig, stage, key)
    if not isinstance(stage, dict):
        return
    if config is not WRONG:
        _check_feed(checked, config, key)
    name = stage.get("name")
    if not isinstance(name, str):
        return
    if name in made:
        checked.report((*key, "name"), f'the name "{name}" is taken by an earlier stage')
    if name in {f.name for f in fields(RunConfig)}:
        checked.report((*key, "name"), f'a stage cannot be named "{name}": that is a key of the run')
    if name in _FOLDERS:
        checked.report((*key, "name"), f'a stage cannot be named "{name}": the run keeps something else under that name in its folder')
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]{0,63}", name):
        checked.report((*key, "name"), f'the name "{name}" cannot be a folder and a key; allowed: at most 64 letters, digits, - and _')
    made.setdefault(name, _makes(checked.registry, stage))


def _makes(registry: Registry, stage: dict[str, Any]) -> str:
    """What a stage makes, as far as it can be told from one that may be wrong elsewhere; "" is unknown."""
    optimizer = stage.get("optimizer")
    if optimizer is None:
        return "evaluation" if stage.get("evaluate") is not None else ""
    kind = optimizer.get("kind") if isinstance(optimizer, dict) else None
    specs: Mapping[str, Any] = registry.specs(Optimizer)
    return str(specs[kind].makes) if isinstance(kind, str) and kind in specs else ""


def _check_feed(checked: Validator, stage: StageConfig, key: Key) -> None:
    """What a stage needs, and what it has no use for."""
    name = stage.name
    if (stage.optimizer is None) == (stage.evaluate is None):
        checked.report(key, f"{name} needs one of optimizer and evaluate, and not both")
        return
    if stage.optimizer is None:
        for unused in _ONLY_WITH_OPTIMIZER:
            if getattr(stage, unused) is not None:
                checked.report((*key, unused), f"{name}.{unused} means nothing to a stage that evaluates; remove it")
        return
    spec = checked.registry.optimizer(stage.optimizer.kind)
    from_rollouts = spec.feed == "rollouts"
    needed, refused = (("prompts", "reward"), ("data", "validation")) if from_rollouts else (("data",), ("prompts", "reward", "watch"))
    for missing in needed:
        if getattr(stage, missing) is None:
            checked.report(key, f"{name} has no {missing}; optimizer {spec.kind} learns from {spec.feed} and needs it")
    for unused in refused:
        if getattr(stage, unused) is not None:
            checked.report((*key, unused), f"{name}.{unused} is not used: optimizer {spec.kind} learns from {spec.feed}; remove it")
    if stage.select is not None:
        _check_selection(checked, stage, stage.select.by, spec, (*key, "select"))


def _check_selection(checked: Validator, stage: StageConfig, by: str, spec: OptimizerSpec, key: Key) -> None:
    """Candidates are what is validated, so there must be several, with the figure that they are selected by."""
    name = f"{stage.name}.select"
    if not stage.validate_every:
        checked.report(key, f"{name} has one candidate to choose from: {stage.name}.validate_every is 0; set it to a number of steps")
    if by == "loss" and stage.validation is None:
        checked.report(key, f"{name} is by loss, and {stage.name} has no validation data to compute one on; add it, or select by reward")
    if by == "reward" and spec.makes != "policy":
        checked.report(key, f"{name} is by reward, and optimizer {spec.kind} makes no policy to draw responses from; select by loss")


def _nested(resolved: dict[Key, Any]) -> dict[str, Any]:
    """Values by their keys, as nested dicts and lists, in the order of the schema."""
    tree: dict[Any, Any] = {}
    for key, value in resolved.items():
        node = tree
        for part in key[:-1]:
            node = node.setdefault(part, {})
        node[key[-1]] = value

    def lists(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        if node and all(isinstance(part, int) for part in node):
            return [lists(child) for child in node.values()]
        return {part: lists(child) for part, child in node.items()}

    nested: dict[str, Any] = lists(tree)
    return nested


def _origins(checked: Validator) -> dict[str, str]:
    document = checked.document
    return {document.named(key): "default" if key in checked.defaults else document.origin(key) for key in checked.resolved}
