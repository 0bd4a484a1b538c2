"""Plain values to frozen dataclasses: the dataclass fields are the schema, and every mistake is collected with its place."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from alignkit.config.document import Document, Key
from alignkit.errors import SettingError
from alignkit.interfaces import Spec
from alignkit.registry import Registry
from alignkit.settings import Component, FilePath, Range, StageName

WRONG = object()
"""Stands for a value that a problem was reported about."""


@dataclass
class Validator:
    """One walk over a document. ``earlier``: the stages that the part being looked at may refer to."""

    document: Document
    registry: Registry
    earlier: Sequence[str] = ()
    problems: list[tuple[int, int, str]] = field(default_factory=list)
    resolved: dict[Key, Any] = field(default_factory=dict)

    def report(self, key: Key, message: str) -> Any:
        """Note a problem with the value at ``key``; overridden values are named by their override."""
        place = self.document.place(key)
        for n in range(len(key), -1, -1):
            if key[:n] in self.document.overridden:
                self.problems.append((0, 0, f'override "{self.document.overridden[key[:n]]}": {message}'))
                return WRONG
        self.problems.append((*place, f"{self.document.file}:{place[0]}:{place[1]}: {message}"))
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
            if value in choices and not isinstance(value, bool):
                return value
            return self.wrong(key, value, ", ".join(map(str, choices)) + did_you_mean(value, choices))
        if origin is tuple:
            if not isinstance(value, list):
                return self.wrong(key, value, "a list")
            items = [self.value(get_args(kind)[0], item, (*key, i)) for i, item in enumerate(value)]
            return WRONG if WRONG in items else tuple(items)
        if origin is Component:
            return self.component(get_args(kind)[0], value, key)
        if dataclasses.is_dataclass(kind):
            return self.dataclass(typing.cast(type, kind), value, key)
        if kind is StageName:
            return self._stage(value, key)
        if kind is FilePath:
            return self._file(value, key)
        return self._scalar(kind, value, key)

    def component(self, interface: type, value: Any, key: Key) -> Any:
        """A mapping with a ``kind`` and that kind's keys."""
        specs: Mapping[str, Spec] = self.registry.specs(interface)
        name = self.document.named(key)
        if not isinstance(value, dict):
            return self.wrong(key, value, f"a mapping with a kind, such as {{kind: {next(iter(sorted(specs)), '...')}}}")
        kind = value.get("kind")
        if kind is None:
            return self.report(key, f"{name} has no kind; allowed: {', '.join(sorted(specs))}")
        if not isinstance(kind, str) or kind not in specs:
            failed = [f"{failure.name} ({failure.error.splitlines()[0]})" for failure in self.registry.failures]
            cause = f"; plugins that failed to load: {', '.join(failed)}" if failed else ""
            allowed = ", ".join(sorted(specs)) or "none is installed"
            return self.wrong((*key, "kind"), kind, f"{allowed}{did_you_mean(kind, specs)}{cause}")
        self.resolved[(*key, "kind")] = kind
        config = self.dataclass(specs[kind].config, {k: v for k, v in value.items() if k != "kind"}, key, besides=("kind",))
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
            where = (*key, *error.key.split("."))
            return self.report(where, f"{self.document.named(where)} {error.message}")

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
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not kind:
            hint = "; quote it" if kind is str and value is not None and not isinstance(value, dict | list) else ""
            return self.wrong(key, value, words[kind] + hint)
        if kind is float and value != value:
            return self.wrong(key, value, "a number")
        self.resolved[key] = value
        return value

    def _stage(self, value: Any, key: Key) -> Any:
        if self._scalar(str, value, key) is WRONG:
            return WRONG
        if value not in self.earlier:
            earlier = ", ".join(self.earlier) or "none: this is the first stage"
            return self.wrong(key, value, f"an earlier stage ({earlier}){did_you_mean(value, self.earlier)}")
        return value

    def _file(self, value: Any, key: Key) -> Any:
        if self._scalar(str, value, key) is WRONG:
            return WRONG
        beside = Path(self.document.file).parent
        for candidate in (Path(value), beside / value):
            if candidate.exists():
                return str(candidate.resolve())
        near = difflib.get_close_matches(Path(value).name, [p.name for p in (beside / value).parent.glob("*")], n=1)
        hint = f'; did you mean "{Path(value).with_name(near[0])}"?' if near else ""
        return self.report(key, f"{self.document.named(key)} is {shown(value)}: no such file here or beside the config{hint}")

    def _note_default(self, key: Key, default: Any) -> None:
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            for f in dataclasses.fields(default):
                self._note_default((*key, f.name), getattr(default, f.name))
        else:
            self.resolved[key] = list(default) if isinstance(default, tuple) else default


def did_you_mean(found: Any, names: Iterable[Any]) -> str:
    """``; did you mean "x"?`` for the name that is nearest, if one is near."""
    near = difflib.get_close_matches(str(found), list(map(str, names)), n=1)
    return f'; did you mean "{near[0]}"?' if near else ""


def shown(value: Any) -> str:
    """A value as its writer would know it."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return {dict: "a mapping", list: "a list"}.get(type(value), str(value))
