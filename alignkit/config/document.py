"""A YAML file as plain values, each with the place it was written at, and the overrides laid over them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from alignkit.config.schema import RunConfig
from alignkit.errors import ConfigError
from alignkit.registry import did_you_mean

Key = tuple[str | int, ...]
"""Where a value stands: keys and list indices from the top."""

_DEEPEST = 40
_MOST_VALUES = 50_000
"""More than any config has: a file beyond these limits is not one, or was made to exhaust the reader (aliases of aliases)."""


@dataclass
class Document:
    """Values of a config, and where each came from: ``file:line:column``, or the override that set it.

    ``places``: line and column of each value; ``keys``: of the key that stands before it.
    """

    file: str
    values: dict[str, Any]
    places: dict[Key, tuple[int, int]] = field(default_factory=dict)
    keys: dict[Key, tuple[int, int]] = field(default_factory=dict)
    overridden: dict[Key, str] = field(default_factory=dict)

    def place(self, key: Key) -> tuple[int, int]:
        """Line and column of the value, or of the nearest thing around it that was written down."""
        while key not in self.places:
            key = key[:-1]
        return self.places[key]

    def origin(self, key: Key) -> str:
        """Who wrote this value: ``file:line:column`` or ``override``."""
        if any(key[:n] in self.overridden for n in range(len(key) + 1)):
            return "override"
        line, column = self.place(key)
        return f"{self.file}:{line}:{column}"

    def at(self, key: Key, message: str) -> str:
        """``message`` after the place of the value at ``key``, which is its override where it has one."""
        for n in range(len(key), -1, -1):
            if key[:n] in self.overridden:
                return f'override "{self.overridden[key[:n]]}": {message}'
        if key not in self.places:
            # Nobody wrote it in the file: it may have come into being by an override of something inside it.
            for inner, text in self.overridden.items():
                if inner[: len(key)] == key:
                    return f'override "{text}": {message}'
        line, column = self.place(key)
        return f"{self.file}:{line}:{column}: {message}"

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


_TAG = "tag:yaml.org,2002:"
_SCALARS = {f"{_TAG}{name}" for name in ("str", "int", "float", "bool", "null")}
# Dates are words too, 1:30 is not ninety, and 017 is not fifteen.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in (f"{_TAG}null", f"{_TAG}merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_TAG}int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(f"{_TAG}bool", re.compile(r"^(?:true|false|True|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    f"{_TAG}float",
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
    except (OSError, ValueError) as error:
        beside = [near.name for near in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError([f"{name}: cannot be read: {reason}{did_you_mean(path.name, beside)}"]) from None
    document = Document(name, {})
    values, problems = _parse(text, document)
    if problems:
        raise ConfigError(problems)
    if values is None:
        raise ConfigError([f"{name}:1:1: the file is empty; a config has at least name, policy and stages"])
    if not isinstance(values, dict):
        found = "a list" if isinstance(values, list) else repr(values)[:40]
        raise ConfigError([f"{name}:1:1: a config is a mapping of keys to values; found {found}"])
    document.values = values
    return document


def override(document: Document, text: str) -> str | None:
    """Lay ``key=value`` over the document; returns what is wrong with it, None if nothing is."""
    dotted, equals, written = text.partition("=")
    if not equals or "" in dotted.split("."):
        return f'override "{text}": write it as key=value, such as dir=runs/two or ppo.optimizer.kl.coef=0.1'
    value, problems = _parse(written, Document("value", {})) if written else ("", [])
    if problems:
        return f'override "{text}": {problems[0]}'
    key = _key(document, dotted)
    if isinstance(key, str):
        return f'override "{text}": {key}'
    target: Any = document.values
    for depth, part in enumerate(key):
        if isinstance(target, list) and re.fullmatch("[0-9]{1,9}", str(part)):
            part = int(part)
            key = (*key[:depth], part, *key[depth + 1 :])
        if isinstance(target, list) and not (isinstance(part, int) and part < len(target)):
            return f'override "{text}": {document.named(key[:depth])} has no entry {part}; it has {len(target)}, counted from 0'
        if not isinstance(target, dict | list):
            return f'override "{text}": {document.named(key[:depth])} is a single value and has no keys'
        if depth == len(key) - 1:
            break
        if isinstance(target, dict) and target.get(part) is None:
            target[part] = {}
        target = target[part]
    if key[-1] == "kind" and isinstance(target, dict) and target.get("kind") != value:
        # Another kind has other keys: what was written for the old one does not apply.
        target.clear()
    target[key[-1]] = value
    document.overridden[key] = text
    return None


def _key(document: Document, dotted: str) -> Key | str:
    """The place that a dotted name means: its first part is a top-level key or a stage; or what is wrong with it."""
    parts = dotted.split(".")
    stages = document.values.get("stages")
    names = [stage.get("name") if isinstance(stage, dict) else None for stage in stages] if isinstance(stages, list) else []
    if parts[0] in names:
        if len(parts) == 1:
            return f"names a whole stage; name one of its keys, such as {dotted}.max_length"
        return ("stages", names.index(parts[0]), *parts[1:])
    keys = [f.name for f in fields(RunConfig)]
    if len(parts) > 1 and parts[0] not in keys:
        known = [name for name in [*names, *keys] if isinstance(name, str)]
        return f'there is no stage or key "{parts[0]}"{did_you_mean(parts[0], known)}; stages: {", ".join(map(str, names)) or "none"}'
    return tuple(parts)


def _parse(text: str, document: Document) -> tuple[Any, list[str]]:
    """YAML as plain values, whose places go into ``document``, and what is wrong with it."""
    name = document.file
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = error.problem or error.context or ""
        hint = "; indent with spaces, YAML has no tabs" if "\\t" in reason else ""
        return None, [f"{name}:{mark.line + 1}:{mark.column + 1}: not YAML: {reason}{hint}" if mark else f"{name}: not YAML: {reason}"]
    except yaml.YAMLError as error:
        return None, [f"{name}: not YAML: {' '.join(str(error).split())}"]
    except RecursionError:
        return None, [f"{name}: nested too deeply to be a config"]
    reader = _Reader(loader, document)
    return (reader.plain(root, ()) if root is not None else None), reader.problems


class _Reader:
    """Turns YAML nodes into plain values, noting where each stands."""

    def __init__(self, loader: _Loader, document: Document) -> None:
        self.problems: list[str] = []
        self._loader, self._document = loader, document
        self._around: list[yaml.Node] = []
        self._count = 0

    def plain(self, node: yaml.Node, key: Key) -> Any:
        """The node's value. What cannot be read is None, with a problem."""
        self._document.places[key] = _mark(node)
        self._count += 1
        if node in self._around:
            return self._problem(node, "this alias stands inside what it repeats")
        if len(self._around) > _DEEPEST:
            return self._problem(node, "nested too deeply to be a config")
        if self._count > _MOST_VALUES:
            return None if self._count > _MOST_VALUES + 1 else self._problem(node, f"more than {_MOST_VALUES} values; that is no config")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        self._around.append(node)
        values = self._mapping(node, key) if isinstance(node, yaml.MappingNode) else self._sequence(node, key)
        self._around.pop()
        return values

    def _sequence(self, node: yaml.Node, key: Key) -> list[Any]:
        return [self.plain(child, (*key, i)) for i, child in enumerate(node.value) if self._count <= _MOST_VALUES]

    def _mapping(self, node: yaml.Node, key: Key) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name_node, child in node.value:
            name = name_node.value
            if self._count > _MOST_VALUES:
                break
            if not isinstance(name_node, yaml.ScalarNode):
                self._problem(name_node, "a key must be a word")
                continue
            if name_node.tag == f"{_TAG}merge":
                self._problem(name_node, "the merge key << is not supported, since it hides where a value comes from; write the keys out")
                continue
            if name in values:
                self._problem(name_node, f'the key "{name}" stands here a second time; keep one of them')
            values[name] = self.plain(child, (*key, name))
            self._document.keys[(*key, name)] = _mark(name_node)
            if child.value == "" and values[name] is None:
                # An empty value has no place of its own worth showing: its mark is the start of whatever comes next.
                self._document.places[(*key, name)] = _mark(name_node)
        return values

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if node.tag not in _SCALARS:
            return self._problem(node, f"the tag {node.tag.replace(_TAG, '!!')} is not supported; write a plain value")
        try:
            value = self._loader.construct_object(node)
        except (ValueError, KeyError):
            return self._problem(node, f'"{node.value[:40]}" cannot be read as !!{node.tag.replace(_TAG, "")}')
        if isinstance(value, str) and any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in value):
            return self._problem(node, "the text holds a character that cannot be written to a file (NUL, or half of a surrogate pair)")
        return value

    def _problem(self, node: yaml.Node, message: str) -> None:
        line, column = _mark(node)
        self.problems.append(f"{self._document.file}:{line}:{column}: {message}")


def _mark(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def resolve(document: Document) -> Sequence[str]:
    """Resolve ``${...}`` in place, by OmegaConf; returns what cannot be resolved."""
    from omegaconf import Container, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    problems = []

    def walk(value: Any, key: Key) -> Any:
        if isinstance(value, dict):
            return {name: walk(child, (*key, name)) for name, child in value.items()}
        if isinstance(value, list):
            return [walk(child, (*key, i)) for i, child in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        try:
            found: Any = OmegaConf.create(document.values)
            for part in key:
                found = found[part]
        except (OmegaConfBaseException, RecursionError) as error:
            reason = "it refers to itself" if isinstance(error, RecursionError) else (str(error).splitlines() or [type(error).__name__])[0]
        else:
            if not isinstance(found, Container):
                return found
            reason = "it refers to a mapping or a list; refer to a single value"
        problems.append(document.at(key, f'{document.named(key)} is "{value}", which cannot be resolved: {reason}'))
        return value

    document.values = walk(document.values, ())
    return problems
