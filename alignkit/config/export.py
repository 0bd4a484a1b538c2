"""The schema, told to others: JSON schema for editors, the configuration reference for people, one config with its origins."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from alignkit.config.load import LoadedConfig
from alignkit.config.schema import RunConfig
from alignkit.interfaces import DataSource, Evaluator, Optimizer, Policy, RewardSource, Tracker
from alignkit.registry import Registry
from alignkit.settings import Component, DatabaseUrl, FilePath, NewPath, PolicyStage, Range, RewardStage, StageName, interface_of

INTERFACES: dict[str, type] = {
    "policy": Policy,
    "optimizer": Optimizer,
    "reward source": RewardSource,
    "data source": DataSource,
    "evaluator": Evaluator,
    "tracker": Tracker,
}


def json_schema(registry: Registry) -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a config, with the keys of every installed kind."""
    definitions = {
        _reference(interface): {
            "oneOf": [_object(spec.config, spec.kind, spec.summary) for _, spec in sorted(registry.specs(interface).items())]
        }
        for interface in INTERFACES.values()
    }
    top = _object(RunConfig, None, "A run of alignkit")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **top, "$defs": definitions}


def configuration_markdown(registry: Registry) -> str:
    """``docs/configuration.md``."""
    lines = [
        "# Configuration reference",
        "",
        "Made from the schemas of the installed plugins by `make docs`; edit the fields' own descriptions instead of this file.",
        "A key without a default is required. Every key can be overridden on the command line by its dotted name, stages by theirs:",
        "`alignkit run config.yaml dir=runs/two ppo.optimizer.kl.coef=0.1`.",
        "",
        "## The run",
        "",
        *_tables(RunConfig),
    ]
    for noun, interface in INTERFACES.items():
        for kind, spec in sorted(registry.specs(interface).items()):
            lines += [f"## {noun.capitalize()} `{kind}`", "", f"{spec.summary[0].upper()}{spec.summary[1:]}.", "", *_tables(spec.config)]
    return "\n".join(lines).rstrip() + "\n"


def explain(loaded: LoadedConfig) -> str:
    """The resolved config as YAML-like lines, each with who wrote its value."""
    lines: list[str] = []
    for key, origin in loaded.origins.items():
        lines.append(f"{key}: {json.dumps(_at(loaded.resolved, key), ensure_ascii=False)}")
        lines[-1] = f"{lines[-1]:<72}  # {origin}"
    return "\n".join(lines)


def _at(resolved: dict[str, Any], dotted: str) -> Any:
    parts = dotted.split(".")
    node: Any = resolved
    stages = {stage["name"]: stage for stage in resolved["stages"]}
    if parts[0] in stages:
        node, parts = stages[parts[0]], parts[1:]
    for part in parts:
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node


def _reference(interface: type) -> str:
    return interface.__name__


def _object(cls: type, kind: str | None, summary: str) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    properties: dict[str, Any] = {"kind": {"const": kind}} if kind else {}
    required = ["kind"] if kind else []
    for f in dataclasses.fields(cls):
        properties[f.name] = _property(hints[f.name]) | _facts(f)
        if f.default is dataclasses.MISSING:
            required.append(f.name)
    return {"type": "object", "description": summary, "properties": properties, "required": required, "additionalProperties": False}


def _property(kind: Any) -> dict[str, Any]:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_property(option) for option in get_args(kind) if option is not type(None)] + [{"type": "null"}]}
    if origin is Literal:
        return {"enum": list(get_args(kind))}
    if origin is tuple:
        return {"type": "array", "items": _property(get_args(kind)[0])}
    if origin is Component:
        return {"$ref": f"#/$defs/{_reference(interface_of(kind))}"}
    if dataclasses.is_dataclass(kind):
        return _object(typing.cast(type, kind), None, (kind.__doc__ or "").strip().splitlines()[0])
    return {"type": {int: "integer", float: "number", bool: "boolean"}.get(kind, "string")}


def _facts(f: dataclasses.Field[Any]) -> dict[str, Any]:
    bounds: Range = f.metadata.get("range", Range())
    limits = {"minimum": bounds.at_least, "maximum": bounds.at_most, "exclusiveMinimum": bounds.above, "exclusiveMaximum": bounds.below}
    facts: dict[str, Any] = {name: limit for name, limit in limits.items() if limit is not None}
    if f.metadata.get("doc"):
        facts["description"] = f.metadata["doc"]
    if isinstance(f.default, str | int | float | bool):
        facts["default"] = f.default
    return facts


def _tables(cls: type) -> Iterator[str]:
    """A table of the fields of ``cls`` and of the dataclasses inside it, which are shown with dotted keys."""
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    yield from _table_rows(cls, "")
    yield ""


def _table_rows(cls: type, prefix: str) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind, meaning = hints[f.name], f.metadata.get("doc", "")
        nested = _nested_dataclass(kind)
        bounds = str(f.metadata.get("range", Range()))
        described = _words(kind) + (f", {bounds}" if bounds else "")
        default = "" if f.default is dataclasses.MISSING else _default(f.default)
        yield f"| `{prefix}{f.name}` | {described} | {default} | {meaning.replace('|', chr(92) + '|')} |"
        if nested:
            yield from _table_rows(nested, f"{prefix}{f.name}{'[].' if get_origin(kind) is tuple else '.'}")


def _nested_dataclass(kind: Any) -> type | None:
    inner = get_args(kind)[0] if get_origin(kind) is tuple else kind
    return inner if dataclasses.is_dataclass(inner) and isinstance(inner, type) else None


def _default(value: Any) -> str:
    if value is None:
        return "none"
    if dataclasses.is_dataclass(value):
        return "as below"
    if value == ():
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _words(kind: Any) -> str:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _words(next(option for option in get_args(kind) if option is not type(None))) + " or none"
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    if origin is tuple:
        return f"list of {_words(get_args(kind)[0])}"
    if origin is Component:
        noun = next(noun for noun, interface in INTERFACES.items() if interface is interface_of(kind))
        return f"{noun} (a `kind`)"
    if dataclasses.is_dataclass(kind):
        return "mapping"
    known = {
        str: "text",
        int: "whole number",
        float: "number",
        bool: "true or false",
        FilePath: "file",
        NewPath: "path",
        DatabaseUrl: "database URL",
        StageName: "earlier stage",
        PolicyStage: "earlier stage that makes a policy",
        RewardStage: "earlier stage that makes a reward model",
    }
    return known[kind]
