"""A config file and its overrides as a validated ``RunConfig``, or all that is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from alignkit.config.document import Document, Key, override, read, resolve
from alignkit.config.schema import RunConfig, StageConfig
from alignkit.config.validate import WRONG, Validator, did_you_mean
from alignkit.errors import ConfigError
from alignkit.interfaces import Optimizer
from alignkit.registry import Registry

_ONLY_WITH_OPTIMIZER = ("data", "validation", "prompts", "reward", "start", "reference")


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
    problems += resolve(document)
    checked = Validator(document, registry)
    run = _run(checked)
    problems += [message for _, _, message in sorted(checked.problems)]
    if problems:
        raise ConfigError(problems)
    return LoadedConfig(run, Path(path), _nested(checked.resolved), _origins(document, checked.resolved))


def _run(checked: Validator) -> Any:
    """The stages one after another, each knowing the names before it; then the whole."""
    values = checked.document.values
    stages = values.get("stages")
    kinds: dict[str, str] = {}
    if isinstance(stages, list):
        if not stages:
            checked.report(("stages",), "stages is empty; a run has at least one")
        for i, stage in enumerate(stages):
            if isinstance(stage, dict):
                _check_stage(checked, stage, ("stages", i), kinds)
    if checked.problems:
        # What is wrong inside stages was found with the names that each may refer to; look at the rest without them.
        checked.dataclass(RunConfig, {**values, "stages": []} if isinstance(stages, list) else values, ())
        return WRONG
    checked.earlier = tuple(kinds)
    return checked.dataclass(RunConfig, values, ())


def _check_stage(checked: Validator, stage: dict[str, Any], key: Key, kinds: dict[str, str]) -> None:
    """One stage: its own keys, then what they mean together. ``kinds``: what each earlier stage makes."""
    checked.earlier = tuple(kinds)
    made = checked.dataclass(StageConfig, stage, key)
    name = stage.get("name")
    if isinstance(name, str):
        if name in kinds:
            checked.report((*key, "name"), f'the name "{name}" is taken by an earlier stage')
        if name in {f.name for f in fields(RunConfig)}:
            checked.report((*key, "name"), f'a stage cannot be named "{name}": that is a key of the run')
        if not re.fullmatch(r"[A-Za-z_][\w-]*", name):
            checked.report((*key, "name"), f'the name "{name}" cannot be a folder and a key; allowed: letters, digits, - and _')
    policies = [earlier for earlier, makes in kinds.items() if makes == "policy"]
    for reference in ("start", "reference"):
        wanted = stage.get(reference)
        if not isinstance(wanted, str) or wanted in policies:
            continue
        where = f"{checked.document.named(key)}.{reference}"
        if wanted in kinds:
            checked.report((*key, reference), f'{where} is "{wanted}", which makes a {kinds[wanted].replace("_", " ")}, not a policy')
            continue
        later = wanted == name or any(isinstance(s, dict) and s.get("name") == wanted for s in checked.document.values["stages"])
        why = "which does not come before this one" if later else "which is not a stage"
        allowed = ", ".join(policies) or "none yet; leave the key out to start from the run's own policy"
        near = "" if later else did_you_mean(wanted, policies)
        checked.report((*key, reference), f'{where} is "{wanted}", {why}; allowed: {allowed}{near}')
    makes = _check_feed(checked, stage, key) if made is not WRONG else "policy"
    if isinstance(name, str):
        kinds.setdefault(name, makes)


def _check_feed(checked: Validator, stage: dict[str, Any], key: Key) -> str:
    """What a stage needs and what it has no use for; returns what it makes."""
    name = checked.document.named(key)
    if (stage.get("optimizer") is None) == (stage.get("evaluate") is None):
        checked.report(key, f"{name} needs one of optimizer and evaluate, and not both")
        return "policy"
    if stage.get("evaluate") is not None:
        for unused in _ONLY_WITH_OPTIMIZER:
            if stage.get(unused) is not None:
                checked.report((*key, unused), f"{name}.{unused} means nothing to a stage that evaluates; remove it")
        return "evaluation"
    spec: Any = checked.registry.specs(Optimizer)[stage["optimizer"]["kind"]]
    from_rollouts = spec.feed == "rollouts"
    needed, refused = (("prompts", "reward"), ("data", "validation")) if from_rollouts else (("data",), ("prompts", "reward"))
    for missing in needed:
        if stage.get(missing) is None:
            checked.report(key, f"{name} has no {missing}; optimizer {spec.kind} learns from {spec.feed} and needs it")
    for unused in refused:
        if stage.get(unused) is not None:
            checked.report((*key, unused), f"{name}.{unused} is not used: optimizer {spec.kind} learns from {spec.feed}; remove it")
    return str(spec.makes)


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


def _origins(document: Document, resolved: dict[Key, Any]) -> dict[str, str]:
    return {document.named(key): document.origin(key) or "default" for key in resolved}
