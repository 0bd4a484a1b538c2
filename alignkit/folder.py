"""The folder of a run: locked while in use, and kept for one config."""

from __future__ import annotations

import fcntl
import json
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import alignkit
from alignkit.errors import RunError
from alignkit.files import write_json

if TYPE_CHECKING:
    from alignkit.config import LoadedConfig
    from alignkit.registry import Registry

_LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "safetensors", "datasets", "omegaconf", "pluggy")
# Where metrics go and how often state is saved changes nothing that is learnt.
_FREE = ("dir", "trackers", "checkpoint")


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


def claim(folder: Path, loaded: LoadedConfig, registry: Registry, choices: Mapping[str, Any]) -> None:
    """Write ``run.json``, or check that the folder is this config's. Raises ``RunError`` with the differences."""
    path = folder / "run.json"
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))["config"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise RunError(
                f"{path} is not what a run wrote there ({type(error).__name__}); "
                "choose another folder with dir=PATH, or start anew with --fresh"
            ) from error
        changes = sorted(_differences(_learnt(before), _learnt(loaded.resolved)))
        if changes:
            raise RunError(
                f"{folder} holds a run of another config:\n  "
                + "\n  ".join(changes)
                + "\nput the config back, choose another folder with dir=PATH, or start anew with --fresh (the old folder is kept)"
            )
        return
    write_json(path, {
        "alignkit": alignkit.__version__,
        "config": loaded.resolved,
        "origins": loaded.origins,
        "plugins": {plugin.name: f"{plugin.package} {plugin.version}" for plugin in registry.plugins},
        "libraries": {name: found for name in _LIBRARIES if (found := _version(name))},
        "python": sys.version.split()[0],
        "machine": {"system": platform.platform(), "processor": platform.machine()},
        "choices": dict(choices),
    })  # fmt: skip


def set_aside(folder: Path) -> Path:
    """Move an old run out of the way, for ``--fresh``; nothing is deleted. Returns where it is now."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(aside)
    return aside


def _learnt(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _FREE}


def _differences(before: Any, now: Any, where: str = "") -> Iterator[str]:
    """``key: old -> new`` for each leaf that differs; stages are named, not numbered."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from _differences(before.get(key), now.get(key), f"{where}.{key}" if where else str(key))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, (old, new) in enumerate(zip(before, now, strict=True)):
            name = old.get("name", i) if isinstance(old, dict) else i
            yield from _differences(old, new, f"{where}.{name}" if where != "stages" else str(name))
    elif before != now:
        yield f"{where}: {json.dumps(before)} -> {json.dumps(now)}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
