"""A YAML file as plain values, each with the place it was written at, and the overrides laid over them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from alignkit.errors import ConfigError

Key = tuple[str | int, ...]
"""Where a value stands: keys and list indices from the top."""


@dataclass
class Document:
    """Values of a config, and where each came from: ``file:line:column``, or the override that set it."""

    file: str
    values: dict[str, Any]
    places: dict[Key, tuple[int, int]] = field(default_factory=dict)
    overridden: dict[Key, str] = field(default_factory=dict)

    def place(self, key: Key) -> tuple[int, int]:
        """Line and column of the value, or of the nearest thing around it that was written down."""
        while key not in self.places:
            key = key[:-1]
        return self.places[key]

    def origin(self, key: Key) -> str | None:
        """Who wrote exactly this value: ``file:line:column`` or ``override``; None for nobody."""
        if any(key[:n] in self.overridden for n in range(len(key) + 1)):
            return "override"
        return f"{self.file}:{self.places[key][0]}:{self.places[key][1]}" if key in self.places else None

    def named(self, key: Key) -> str:
        """The key as users write it: dotted, stages by their names."""
        parts = list(map(str, key))
        if len(key) >= 2 and key[0] == "stages":
            stages = self.values.get("stages")
            index = key[1]
            stage = stages[index] if isinstance(stages, list) and isinstance(index, int) and index < len(stages) else None
            name = stage.get("name") if isinstance(stage, dict) else None
            parts[:2] = [name] if isinstance(name, str) else [f"stages[{index}]"]
        return ".".join(parts)


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: 1e-5 is a number, and yes is a word."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false|True|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf|\.nan)$"),
    list("-+0123456789."),
)


def read(path: Path) -> Document:
    """The file's values and places. Raises ``ConfigError`` when it is not there or not YAML."""
    name = str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except IsADirectoryError:
        raise ConfigError([f"{name}: is a folder; give the config file"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{name}: not UTF-8 text (byte {error.start})"]) from None
    except OSError as error:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else [], n=1)
        hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
        raise ConfigError([f"{name}: cannot be read: {error.strerror or error}{hint}"]) from None
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        document = Document(name, {})
        problems: list[str] = []
        values = _plain(loader, root, (), document, problems) if root is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise ConfigError([f"{where}: not YAML: {error.problem or error.context}"]) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"{name}: not YAML: {' '.join(str(error).split())}"]) from None
    finally:
        loader.dispose()
    if values is None:
        raise ConfigError([f"{name}:1:1: the file is empty; a config has at least name, policy and stages"])
    if not isinstance(values, dict):
        raise ConfigError([f"{name}:1:1: a config is a mapping of keys to values; found a {type(values).__name__}"])
    if problems:
        raise ConfigError(problems)
    document.values = values
    return document


def override(document: Document, text: str) -> str | None:
    """Lay ``key=value`` over the document; returns what is wrong with it, None if nothing is."""
    dotted, equals, written = text.partition("=")
    if not equals or not dotted:
        return f'override "{text}": write it as key=value, such as dir=runs/two or ppo.optimizer.kl.coef=0.1'
    try:
        value = yaml.load(written, Loader=_Loader) if written else ""  # noqa: S506 - a SafeLoader
    except yaml.YAMLError:
        return f'override "{text}": the value is not YAML; quote it'
    key = _key(document, dotted)
    if isinstance(key, str):
        return f'override "{text}": {key}'
    target: Any = document.values
    for part in key[:-1]:
        if isinstance(target, dict) and target.get(part) is None:
            target[part] = {}
        target = target[part] if isinstance(target, dict) or (isinstance(target, list) and isinstance(part, int)) else None
        if not isinstance(target, dict | list):
            return f'override "{text}": {document.named(key[: key.index(part) + 1])} has no keys'
    if isinstance(target, list):
        if not isinstance(key[-1], int) or key[-1] >= len(target):
            return f'override "{text}": there is no such entry; the list has {len(target)}, counted from 0'
        target[key[-1]] = value
    else:
        if key[-1] == "kind" and target.get("kind") != value:
            # Another kind has other keys: what was written for the old one does not apply.
            target.clear()
        target[key[-1]] = value
    document.overridden[key] = text
    return None


def _key(document: Document, dotted: str) -> Key | str:
    """The place that a dotted name means: its first part is a top-level key or a stage; or what is wrong with it."""
    parts: list[str | int] = [int(part) if part.isdigit() else part for part in dotted.split(".")]
    stages = document.values.get("stages")
    names = [stage.get("name") if isinstance(stage, dict) else None for stage in stages] if isinstance(stages, list) else []
    if parts[0] in names:
        if len(parts) == 1:
            return f"names a whole stage; name one of its keys, such as {dotted}.max_length"
        return ("stages", names.index(str(parts[0])), *parts[1:])
    if len(parts) > 1 and parts[0] not in document.values and parts[0] != "checkpoint":
        near = difflib.get_close_matches(str(parts[0]), [str(name) for name in [*names, *document.values] if name], n=1)
        hint = f'; did you mean "{near[0]}"?' if near else ""
        return f'there is no stage or key "{parts[0]}"; stages: {", ".join(map(str, names))}{hint}'
    return tuple(parts)


def _plain(loader: _Loader, node: yaml.Node, key: Key, document: Document, problems: list[str]) -> Any:
    document.places[key] = (node.start_mark.line + 1, node.start_mark.column + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, child, (*key, i), document, problems) for i, child in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)  # type: ignore[no-untyped-call]
    values: dict[str, Any] = {}
    for name_node, child in node.value:
        where = f"{document.file}:{name_node.start_mark.line + 1}:{name_node.start_mark.column + 1}"
        name = name_node.value
        if not isinstance(name_node, yaml.ScalarNode):
            problems.append(f"{where}: a key must be a word")
            continue
        if name in values:
            problems.append(f'{where}: the key "{name}" stands here a second time; keep one of them')
        values[name] = _plain(loader, child, (*key, name), document, problems)
        if isinstance(child, yaml.ScalarNode) and child.value == "" and values[name] is None:
            document.places[(*key, name)] = (name_node.start_mark.line + 1, name_node.start_mark.column + 1)
    return values


def resolve(document: Document) -> Sequence[str]:
    """Resolve ``${...}`` in place, by OmegaConf; returns what cannot be resolved."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    problems = []
    config = OmegaConf.create(document.values)

    def walk(value: Any, key: Key) -> Any:
        if isinstance(value, dict):
            return {name: walk(child, (*key, name)) for name, child in value.items()}
        if isinstance(value, list):
            return [walk(child, (*key, i)) for i, child in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        try:
            return OmegaConf.select(config, _path(key), throw_on_missing=True)
        except OmegaConfBaseException as error:
            line, column = document.place(key)
            reason = str(error).splitlines()[0]
            problems.append(f'{document.file}:{line}:{column}: {document.named(key)} is "{value}", which cannot be resolved: {reason}')
            return value

    document.values = walk(document.values, ())
    return problems


def _path(key: Key) -> str:
    return "".join(f"[{part}]" for part in key)
