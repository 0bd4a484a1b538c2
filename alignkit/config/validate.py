"""Plain values to frozen dataclasses: the dataclass fields are the schema, and every mistake is collected with its place."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from alignkit.config.document import Document, Key
from alignkit.errors import PluginError, SettingError
from alignkit.registry import Registry, did_you_mean
from alignkit.settings import Component, DatabaseUrl, FilePath, NewPath, PolicyStage, Range, RewardStage, StageName, interface_of

WRONG = object()
"""Stands for a value that a problem was reported about."""

_STAGES = {StageName: None, PolicyStage: "policy", RewardStage: "reward_model"}
"""What a stage must make to be named in a field of this type; None: anything."""


@dataclass
class Validator:
    """One walk over a document. ``earlier``: the stages that the part being looked at may refer to, with what each makes ("" is unknown).

    ``resolved``: every value by its key; ``defaults``: the keys that nobody wrote.
    """

    document: Document
    registry: Registry
    earlier: Mapping[str, str] = field(default_factory=dict)
    problems: list[tuple[int, int, str]] = field(default_factory=list)
    resolved: dict[Key, Any] = field(default_factory=dict)
    defaults: set[Key] = field(default_factory=set)

    def report(self, key: Key, message: str) -> Any:
        """Note a problem with the value at ``key``; overridden values are named by their override."""
        self.problems.append((*self.document.place(key), self.document.at(key, message)))
        return WRONG

    def wrong(self, key: Key, value: Any, allowed: str) -> Any:
        """Note a value that is not what it should be."""
        return self.report(key, f"{self.document.named(key)} is {shown(value)}; allowed: {allowed}")

    def value(self, kind: Any, value: Any, key: Key) -> Any:
        """``value`` as the type ``kind``, or ``WRONG``."""
        origin = get_origin(kind)
        if origin in (Union, types.UnionType):
            return self._optional(kind, value, key)
        if origin is Literal:
            choices = get_args(kind)
            if isinstance(value, str) and value in choices:
                self.resolved[key] = value
                return value
            return self.wrong(key, value, ", ".join(choices) + did_you_mean(str(value), choices))
        if origin is tuple:
            if not isinstance(value, list):
                return self.wrong(key, value, "a list")
            if not value:
                self.resolved[key] = []
            items = [self.value(get_args(kind)[0], item, (*key, i)) for i, item in enumerate(value)]
            return WRONG if WRONG in items else tuple(items)
        if origin is Component:
            return self.component(interface_of(kind), value, key)
        if dataclasses.is_dataclass(kind):
            return self.dataclass(typing.cast(type, kind), value, key)
        if kind in _STAGES:
            return self._stage(value, key, _STAGES[kind])
        if kind is FilePath:
            return self._file(value, key)
        if kind is NewPath:
            return self._new_path(value, key)
        if kind is DatabaseUrl:
            return self._database(value, key)
        return self._scalar(kind, value, key)

    def component(self, interface: type, value: Any, key: Key) -> Any:
        """A mapping with a ``kind`` and that kind's keys."""
        specs = self.registry.specs(interface)
        name = self.document.named(key)
        if not isinstance(value, dict):
            return self.wrong(key, value, f"a mapping with a kind, such as {{kind: {next(iter(specs), '...')}}}")
        kind = value.get("kind")
        if kind is None:
            return self.report(key, f"{name} has no kind; allowed: {', '.join(specs)}")
        if not isinstance(kind, str):
            return self.wrong((*key, "kind"), kind, ", ".join(specs))
        try:
            spec = self.registry.spec(interface, kind)
        except PluginError as error:
            return self.report((*key, "kind"), f"{name}.kind: {error}")
        self.resolved[(*key, "kind")] = kind
        config = self.dataclass(spec.config, {k: v for k, v in value.items() if k != "kind"}, key, besides=("kind",))
        return WRONG if config is WRONG else Component(kind, config)

    def dataclass(self, cls: type, value: Any, key: Key, besides: Iterable[str] = ()) -> Any:
        """A mapping with the fields of ``cls``."""
        name = self.document.named(key)
        if not isinstance(value, dict):
            return self.wrong(key, value, "a mapping of keys to values")
        hints = typing.get_type_hints(cls)
        fields = {f.name: f for f in dataclasses.fields(cls)}
        wrong = False
        for given in value:
            if given not in fields:
                wrong = True
                where = f"{name}.{given}" if name else str(given)
                if (inner := (*key, given)) in self.document.keys:
                    self.document.places[inner] = self.document.keys[inner]  # the key is what is wrong, not its value
                if reason := vars(cls).get("refused", {}).get(given):
                    self.report((*key, given), f"{where} is refused: {reason}")
                    continue
                allowed = ", ".join([*besides, *fields])
                self.report((*key, given), f"{where} is not a key; allowed: {allowed}{did_you_mean(given, fields)}")
        made = {}
        for f in fields.values():
            inner = (*key, f.name)
            if f.name in value:
                made[f.name] = self._field(hints[f.name], value[f.name], inner, f)
                wrong |= made[f.name] is WRONG
            elif f.default is dataclasses.MISSING:
                wrong = True
                meaning = f.metadata.get("doc", "")
                self.report(key, f"{name + ': ' if name else ''}the key {f.name} is missing{f' ({meaning})' if meaning else ''}")
            else:
                self._note_default(inner, f.default)
        if wrong:
            return WRONG
        try:
            return cls(**made)
        except SettingError as error:
            inside = (*key, *(int(part) if re.fullmatch("[0-9]+", part) else part for part in error.key.split(".")))
            return self.report(inside, f"{self.document.named(inside)} {error.message}")

    def _field(self, hint: Any, value: Any, key: Key, f: dataclasses.Field[Any]) -> Any:
        found = self.value(hint, value, key)
        bounds = f.metadata.get("range", Range())
        if isinstance(found, int | float) and not isinstance(found, bool) and not bounds.admits(found):
            return self.wrong(key, found, f"{'a whole number' if isinstance(found, int) else 'a number'} {bounds}")
        return found

    def _optional(self, kind: Any, value: Any, key: Key) -> Any:
        options = [option for option in get_args(kind) if option is not type(None)]
        if value is None:
            self.resolved[key] = None
            return None
        return self.value(options[0], value, key)

    def _scalar(self, kind: Any, value: Any, key: Key) -> Any:
        words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
        if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
            value = float(value)
        if type(value) is not kind:
            hint = "; quote it" if kind is str and value is not None and not isinstance(value, dict | list) else ""
            return self.wrong(key, value, words[kind] + hint)
        if kind is float and not math.isfinite(value):
            return self.wrong(key, value, "a finite number")
        self.resolved[key] = value
        return value

    def _stage(self, value: Any, key: Key, needed: str | None) -> Any:
        if self._scalar(str, value, key) is WRONG:
            return WRONG
        if value in self.earlier and (needed is None or self.earlier[value] in (needed, "")):
            return value
        name = self.document.named(key)
        usable = [stage for stage, makes in self.earlier.items() if needed is None or makes in (needed, "")]
        what = f"an earlier stage that makes a {_spaced(needed)}" if needed else "an earlier stage"
        allowed = f"allowed: {what} ({', '.join(usable) or 'there is none'})"
        if value in self.earlier:
            return self.report(key, f'{name} is "{value}", which makes {_spaced(self.earlier[value], article=True)}; {allowed}')
        stages = self.document.values.get("stages")
        later = any(isinstance(stage, dict) and stage.get("name") == value for stage in (stages if isinstance(stages, list) else []))
        why = "which does not come before this one" if later else f"which is not a stage{did_you_mean(value, usable)}"
        return self.report(key, f'{name} is "{value}", {why}; {allowed}')

    def _file(self, value: Any, key: Key) -> Any:
        if self._scalar(str, value, key) is WRONG:
            return WRONG
        if not value:
            return self.wrong(key, value, "the path of a file or folder that is there")
        path, beside = Path(value), Path(self.document.file).parent / value
        try:
            found = next((candidate.resolve() for candidate in (path, beside) if candidate.exists()), None)
            near = [] if found else [other.name for other in beside.parent.glob("*")]
        except OSError as error:
            return self.report(key, f"{self.document.named(key)} is {shown(value[:200])}: {error.strerror}")
        if found is None:
            return self.report(
                key, f"{self.document.named(key)} is {shown(value)}: no such file here or beside the config{did_you_mean(path.name, near)}"
            )
        return str(found)

    def _new_path(self, value: Any, key: Key) -> Any:
        if self._scalar(str, value, key) is WRONG:
            return WRONG
        if not value:
            return self.wrong(key, value, "the path of a file or folder")
        path, beside = Path(value), Path(self.document.file).parent / value
        return str((beside if beside.exists() and not path.exists() else path).resolve())

    def _database(self, value: Any, key: Key) -> Any:
        if self._scalar(str, value, key) is WRONG:
            return WRONG
        scheme, slashes, path = value.partition(":///")
        if scheme != "sqlite":
            return value
        if not path:
            return self.wrong(key, value, "sqlite:///PATH, of a database that is there")
        found = self._file(path, key)
        return WRONG if found is WRONG else f"{scheme}{slashes}{found}"

    def _note_default(self, key: Key, default: Any) -> None:
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            for f in dataclasses.fields(default):
                self._note_default((*key, f.name), getattr(default, f.name))
        else:
            self.resolved[key] = list(default) if isinstance(default, tuple) else default
            self.defaults.add(key)


def _spaced(makes: str, *, article: bool = False) -> str:
    words = makes.replace("_", " ")
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}" if article else words


def shown(value: Any) -> str:
    """A value as its writer would know it."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    return str(value)
