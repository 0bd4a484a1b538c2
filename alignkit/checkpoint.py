"""Checkpoints that are whole and verified, or not there at all. Tensors are safetensors, the rest is JSON; nothing is pickled.

``step-00000120/``: one safetensors file a part, ``state.json``, and ``manifest.json``, written last, with the sha256 of each file.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from alignkit.errors import CheckpointError
from alignkit.files import FileHash, hash_folder, sha256, sync_file, sync_folder, write_json
from alignkit.interfaces import State

FORMAT = 1
_MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a run goes on from: the number of steps done, and the state of each part."""

    step: int
    states: Mapping[str, State]


def save_checkpoint(folder: Path, step: int, states: Mapping[str, State], keep: int) -> Path:
    """Write ``folder/step-...`` in one step, then keep only the newest ``keep``. Raises ``CheckpointError``; what was there stays."""
    target = folder / f"step-{step:08d}"
    with _explained(target):
        folder.mkdir(parents=True, exist_ok=True)
        _check_room(folder, states)
        temporary = folder / f".tmp-{step}-{os.getpid()}"
        temporary.mkdir()
        try:
            _write(temporary, step, states)
            if target.exists():
                shutil.rmtree(target)
            temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(folder)
        for old in _steps(folder)[keep:]:
            _remove(old)
    return target


def load_checkpoint(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose files are what its manifest says; None where there never was one.

    A broken one is named through ``say`` and set aside. Raises ``CheckpointError`` when there are some and all are broken.
    """
    if not folder.is_dir():
        return None
    for leftover in (*folder.glob(".tmp-*"), *folder.glob(".del-*")):
        shutil.rmtree(leftover, ignore_errors=True)
    for path in _steps(folder):
        problem = _problem(path)
        if problem is None:
            return _read(path)
        aside = path.with_name(f"broken-{path.name}")
        path.rename(aside)
        say(f"checkpoint {path} is broken ({problem}); it was set aside as {aside.name}")
    if any(folder.glob("broken-*")):
        raise CheckpointError(
            f"no checkpoint in {folder} can be trusted, and going on without one would lose what was learnt; "
            "restore one of them, or start the run anew with --fresh"
        )
    return None


def save_artifact(folder: Path, write: Callable[[Path], None]) -> dict[str, FileHash]:
    """Let ``write`` fill a folder that appears as ``folder`` only when it is whole; returns the hash of each file."""
    with _explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            write(temporary)
            hashes = hash_folder(temporary)
            for name in hashes:
                sync_file(temporary / name)
            if folder.exists():
                _remove(folder)
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(folder.parent)
    return hashes


def _write(folder: Path, step: int, states: Mapping[str, State]) -> None:
    from safetensors.torch import save_file

    for name, state in states.items():
        if state.tensors:
            # Cloned where they share memory: safetensors holds no aliases.
            save_file(
                {key: tensor.detach().cpu().contiguous().clone() for key, tensor in state.tensors.items()}, folder / f"{name}.safetensors"
            )
            (folder / f"{name}.safetensors").chmod(0o644)
    write_json(folder / "state.json", {name: dict(state.values) for name, state in states.items()})
    files = {name: asdict(found) for name, found in hash_folder(folder).items()}
    for name in files:
        sync_file(folder / name)
    write_json(folder / _MANIFEST, {"format": FORMAT, "step": step, "files": files})


def _read(folder: Path) -> Checkpoint:
    from safetensors.torch import load_file

    manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    values = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    states = {}
    for name, value in values.items():
        path = folder / f"{name}.safetensors"
        # Cloned: the loaded tensors are the file itself, and a file that is cut short later would end the process.
        tensors = {key: tensor.clone() for key, tensor in load_file(path).items()} if path.exists() else {}
        states[name] = State(tensors, value)
    return Checkpoint(manifest["step"], states)


def _problem(folder: Path) -> str | None:
    """Why the checkpoint cannot be trusted, found before anything of it is parsed but its manifest; None if it can."""
    try:
        manifest: Any = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["format"], manifest["files"]
    except FileNotFoundError:
        return "it has no manifest"
    except (ValueError, KeyError, TypeError, OSError):
        return "its manifest cannot be read"
    if version != FORMAT:
        return f"it has format {version}, and this alignkit reads {FORMAT}"
    if "state.json" not in files:
        return "its manifest names no state.json"
    for name, expected in files.items():
        path = folder / name
        if PurePosixPath(name).name != name or path.is_symlink():
            return f"its manifest names {name!r}, which is not a plain file of its own"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if sha256(path) != expected["sha256"]:
            return f"{name} is not what was written"
    return None


def _steps(folder: Path) -> list[Path]:
    """Checkpoints, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def _remove(folder: Path) -> None:
    # Renamed first, so that a kill in the middle leaves no half checkpoint under a name that counts.
    gone = folder.with_name(f".del-{folder.name}-{os.getpid()}")
    folder.rename(gone)
    shutil.rmtree(gone)


def _check_room(folder: Path, states: Mapping[str, State]) -> None:
    need = 1.05 * sum(tensor.numel() * tensor.element_size() for state in states.values() for tensor in state.tensors.values())
    free = shutil.disk_usage(folder).free
    if need > free:
        raise CheckpointError(
            f"a checkpoint in {folder} needs {need / 1e6:.0f} MB and {free / 1e6:.0f} MB are free; "
            "free some space and run the same command again: it continues from the checkpoint before"
        )


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Errors of the disk in words; the reader can repair them."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        # A full disk inside save_file is no OSError.
        raise CheckpointError(f"{target} cannot be written: {error}; what was saved before is intact") from error
    except OSError as error:
        reason = {errno.ENOSPC: "the disk is full", errno.EROFS: "the folder is read-only", errno.EACCES: "permission denied"}
        said = reason.get(error.errno or 0, error.strerror or str(error))
        raise CheckpointError(f"{target} cannot be written: {said}; what was saved before is intact") from error
