"""What can be measured of an answer: each metric has a name, versions, and values that are checked before one is stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sqlalchemy import Connection, insert, select

from alignkit_serve.store.errors import StoreError
from alignkit_serve.store.tables import fields_of, metric

Type = Literal["bool", "float", "likert", "categorical"]
Level = Literal["completion", "inference", "episode", "group"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """``level``: what it is a property of. ``lo`` and ``hi`` are both allowed values. ``optimize``: which end is the better one."""

    id: str
    name: str
    version: int = 1
    type: Type
    level: Level
    lo: float | None = None
    hi: float | None = None
    categories: Sequence[str] | None = None
    optimize: Literal["max", "min"] | None = None

    def problem(self, value: object) -> str | None:
        """What is wrong with a value, in words; None: nothing."""
        right = {
            "bool": isinstance(value, bool),
            "float": isinstance(value, int | float) and not isinstance(value, bool),
            "likert": isinstance(value, int) and not isinstance(value, bool),
            "categorical": isinstance(value, str) and value in (self.categories or ()),
        }[self.type]
        if right and isinstance(value, int | float):
            right = (self.lo is None or value >= self.lo) and (self.hi is None or value <= self.hi)
        return None if right else f"{value!r} is no value of the metric {self.name!r}, version {self.version}; allowed: {self.allowed()}"

    def allowed(self) -> str:
        """Its values, in words."""
        if self.type == "bool":
            return "true, false"
        if self.type == "categorical":
            return ", ".join(self.categories or ())
        number = "a whole number" if self.type == "likert" else "a number"
        least = "" if self.lo is None else f" from {self.lo:g}"
        most = "" if self.hi is None else f" up to {self.hi:g}"
        return number + least + most


_COLUMNS = [metric.c[name] for name in Metric.__dataclass_fields__]


def define(connection: Connection, wanted: Metric) -> tuple[Metric, bool]:
    """The metric as its name's newest version, and whether it is new: one that is as it was stays. Raises ``StoreError`` for no metric."""
    _check(wanted)
    last = get(connection, wanted.name)
    if last and replace(last, id=wanted.id, version=wanted.version) == wanted:
        return last, False
    made = replace(wanted, version=last.version + 1 if last else 1)
    connection.execute(insert(metric), fields_of(made))
    return made, True


def get(connection: Connection, name: str, version: int | None = None) -> Metric | None:
    """By name; the newest version where none is named."""
    wanted = [metric.c.name == name] + ([metric.c.version == version] if version is not None else [])
    row = connection.execute(select(*_COLUMNS).where(*wanted).order_by(metric.c.version.desc()).limit(1)).one_or_none()
    return Metric(**row._mapping) if row else None


def by_id(connection: Connection, id: str) -> Metric:
    """One that feedback refers to, and that is there for that."""
    return Metric(**connection.execute(select(*_COLUMNS).where(metric.c.id == id)).one()._mapping)


def listed(connection: Connection) -> list[Metric]:
    """All versions of all, by name."""
    return [Metric(**row._mapping) for row in connection.execute(select(*_COLUMNS).order_by(metric.c.name, metric.c.version))]


def _check(wanted: Metric) -> None:
    numbers = wanted.type in ("float", "likert")
    if not numbers and (wanted.lo is not None or wanted.hi is not None):
        raise StoreError(f"the metric {wanted.name!r} is {wanted.type} and has no lo and hi; leave them out")
    if wanted.type == "likert" and not (_whole(wanted.lo) and _whole(wanted.hi)):
        raise StoreError(f"the metric {wanted.name!r} is likert and needs whole numbers for lo and hi, such as 1 and 7")
    if wanted.lo is not None and wanted.hi is not None and wanted.lo >= wanted.hi:
        raise StoreError(f"the metric {wanted.name!r} has lo {wanted.lo:g} and hi {wanted.hi:g}; lo is the smaller one")
    several = len(set(wanted.categories or ())) == len(wanted.categories or ()) > 1
    if (wanted.type == "categorical") != several:
        needs = "needs two or more categories that differ" if wanted.type == "categorical" else "has no categories; leave them out"
        raise StoreError(f"the metric {wanted.name!r} is {wanted.type} and {needs}")


def _whole(number: float | None) -> bool:
    return number is not None and number == int(number)
