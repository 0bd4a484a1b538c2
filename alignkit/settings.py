"""How a config dataclass declares its keys: a default written once, its meaning, its range, and nested components.

Torch-free and omegaconf-free, so that a plugin's declaring module may import it.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any, Generic, NewType, TypeVar, get_args, get_origin

T = TypeVar("T")

StageName = NewType("StageName", str)
"""A field of this type names an earlier stage, whatever it makes."""

PolicyStage = NewType("PolicyStage", StageName)
"""A field of this type names an earlier stage that makes a policy."""

RewardStage = NewType("RewardStage", StageName)
"""A field of this type names an earlier stage that makes a reward model."""

FilePath = NewType("FilePath", str)
"""A field of this type names a file or folder that is there, relative to the working directory or to the config; it is made absolute."""

NewPath = NewType("NewPath", str)
"""As ``FilePath``, of what need not be there yet: then it is relative to the working directory."""

DatabaseUrl = NewType("DatabaseUrl", str)
"""A field of this type is the URL of a database; the path in ``sqlite:///PATH`` is a ``FilePath``."""


@dataclass(frozen=True, slots=True)
class Range:
    """Bounds of a number: ``at_least`` and ``at_most`` are allowed values, ``above`` and ``below`` are not."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None

    def __str__(self) -> str:
        words = [("at least", self.at_least), ("above", self.above), ("at most", self.at_most), ("below", self.below)]
        return " and ".join(f"{word} {bound:.12g}" for word, bound in words if bound is not None)

    def admits(self, value: float) -> bool:
        """Whether ``value`` lies within the bounds."""
        return not (
            (self.at_least is not None and value < self.at_least)
            or (self.at_most is not None and value > self.at_most)
            or (self.above is not None and value <= self.above)
            or (self.below is not None and value >= self.below)
        )


def setting(
    default: Any = MISSING,
    doc: str = "",
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A field of a config dataclass: its default (none: the key is required), its meaning for the docs, its range.

    A default that is a list or a dict is not allowed: use a tuple or a nested frozen dataclass.
    """
    metadata = {"doc": doc, "range": Range(at_least, at_most, above, below)}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Component(Generic[T]):
    """A part chosen by ``kind``: ``Component[RewardSource]`` in a dataclass makes ``{kind: ..., ...}`` in the config.

    ``config`` is the validated dataclass of that kind. ``context.build(component)`` makes the part.
    """

    kind: str
    config: Any


def interface_of(annotation: Any) -> type:
    """The interface that a field annotated ``Component[Interface]`` asks for; ``Component[Optimizer[Any]]`` asks for ``Optimizer``."""
    (interface,) = get_args(annotation)
    named: type = get_origin(interface) or interface
    return named
