"""The folder of a run: locked while in use, and kept for one config."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import alignkit
from alignkit.errors import RunError
from alignkit.files import write_json
from alignkit.settings import Component
from alignkit.world import Changes, differences

if TYPE_CHECKING:
    from alignkit.config import LoadedConfig
    from alignkit.registry import Registry

_LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "numpy", "safetensors", "datasets", "omegaconf", "pluggy")
_COMPUTING = ("torch", "transformers", "tokenizers", "peft", "numpy")
"""Those whose other version may round, or draw, differently."""
_PLACE = ("threads", "device", "cpu", "kernels")
"""Of what was chosen on the machine, that which rounds differently elsewhere."""
_FREE = ("dir", "trackers", "checkpoint", "checks", "threads")
"""Where metrics go, how often state is saved and what is looked at changes nothing that is learnt; threads change what is rounded."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process alone; the lock goes with the process, however that ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / "run.lock").open("w")
    except OSError as error:
        raise RunError(f"the run's folder {folder} cannot be written: {error.strerror}; choose another with dir=PATH") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"another process is running in {folder}; wait for it, or choose another folder with dir=PATH") from error
        yield


def choices_of(folder: Path) -> Mapping[str, Any]:
    """What the run in ``folder`` found to be fastest when it began; nothing where there is no run yet."""
    try:
        found: Mapping[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))["choices"]
    except (OSError, ValueError, LookupError, TypeError):
        return {}  # ``claim`` says what is wrong with it
    return found


def claim(folder: Path, loaded: LoadedConfig, registry: Registry, choices: Mapping[str, Any], changes: Changes) -> None:
    """Write ``run.json``, or check that the folder is this config's, by the same plugins, on a machine like that.

    Raises ``RunError`` with the differences; those that were accepted are in ``run.json`` from now on.
    """
    path = folder / "run.json"
    now: dict[str, Any] = {
        "alignkit": alignkit.__version__,
        "config": loaded.resolved,
        "origins": loaded.origins,
        "plugins": {plugin.name: f"{plugin.package} {plugin.version}" for plugin in registry.plugins},
        "libraries": {name: found for name in _LIBRARIES if (found := _version(name))},
        "python": sys.version.split()[0],
        "machine": {"system": platform.platform(), "processor": platform.machine()},
        "choices": dict(choices),
    }
    if not path.is_file():
        write_json(path, now)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        used = _used(loaded, registry)
        changed = sorted(differences(_learnt(before["config"]), _learnt(loaded.resolved)))
        changed += sorted(differences(_of(before["plugins"], used), _of(now["plugins"], used), "plugins"))
        elsewhere = sorted(differences(_of(before["libraries"], _COMPUTING), _of(now["libraries"], _COMPUTING), "libraries"))
        elsewhere += sorted(differences(_of(before["choices"], _PLACE), _of(choices, _PLACE)))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RunError(
            f"{path} is not what a run wrote there ({type(error).__name__}); "
            "choose another folder with dir=PATH, or start anew with --fresh"
        ) from error
    changes.settle(f"the run in {folder}", changed)
    changes.warn(elsewhere)
    if changed:
        write_json(path, now)


def set_aside(folder: Path) -> Path:
    """Move an old run out of the way, for ``--fresh``; nothing is deleted. Returns where it is now."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(aside)
    return aside


def _learnt(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _FREE}


def _of(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def _used(loaded: LoadedConfig, registry: Registry) -> list[str]:
    """The plugins whose parts the run is made of."""
    configs = {type(component.config) for component in _components([loaded.run.policy, *loaded.run.stages])}
    return [plugin.name for plugin in registry.plugins if any(spec.config in configs for specs in plugin.specs.values() for spec in specs)]


def _components(value: Any) -> Iterator[Component[Any]]:
    """Every part that a config names, at any depth."""
    if isinstance(value, Component):
        yield value
        yield from _components(value.config)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _components(one)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _components(getattr(value, field.name))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
