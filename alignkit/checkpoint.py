"""Checkpoints that are whole and verified, or not there at all. Tensors are safetensors, the rest is JSON; nothing is pickled.

``step-00000120/``: one safetensors file a part, ``state.json``, and ``manifest.json``, written last, with the sha256 of each file:
no format of tensors notices a flipped bit by itself.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import CheckpointError, SaveError
from alignkit.files import FileHash, difference, explained, hash_folder, json_text, sync_file, sync_folder, write_text
from alignkit.interfaces import State

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
"""The version of the form above; a checkpoint of another version is refused, never guessed at."""

_MANIFEST = "manifest.json"
_VALUES = "state.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a stage goes on from: the number of steps done, and the state of each part."""

    step: int
    states: Mapping[str, State]


class _Broken(Exception):
    """Why a checkpoint cannot be trusted."""


def save_checkpoint(folder: Path, step: int, states: Mapping[str, State], keep: int, *, anchors: Collection[int] = ()) -> Path:
    """Write ``folder/step-...`` so that it appears whole or not at all, then remove all but the newest ``keep``.

    For each step in ``anchors``, the newest from before it stays as well.
    Raises ``SaveError`` when the disk refuses, ``CheckpointError`` when a state holds what JSON cannot; the checkpoints before are as
    they were.
    """
    target = folder / f"step-{step:08d}"
    values = json_text({name: _checked(target, name, state.values) for name, state in states.items()})
    with explained(f"{target} cannot be written", SaveError, remedy=""):
        folder.mkdir(parents=True, exist_ok=True)
        _check_room(folder, states)
        with _appearing(target, folder / f".tmp-{step}-{os.getpid()}") as temporary:
            _write_tensors(temporary, states)
            write_text(temporary / _VALUES, values)
            files = {name: asdict(found) for name, found in _seal(temporary).items()}
            write_text(temporary / _MANIFEST, json_text({"format": FORMAT, "step": step, "files": files}))
    with explained(f"{target} is written, but the checkpoints before it cannot be removed", SaveError, remedy=""):
        steps = _steps(folder)
        stay = {next((path for path in steps if _number(path) < anchor), None) for anchor in anchors}
        for old in steps[keep:]:
            if old not in stay:
                shutil.rmtree(_hidden(old))
    return target


def forget(folder: Path, step: int) -> None:
    """Remove the checkpoints of ``step`` and later. Raises ``SaveError`` when the disk refuses."""
    with explained(f"the checkpoints in {folder} cannot be removed", SaveError, remedy=""):
        for path in _steps(folder) if folder.is_dir() else ():
            if _number(path) >= step:
                shutil.rmtree(_hidden(path))


def load_checkpoint(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose files are what its manifest says; None where there never was one.

    A broken one is named through ``say`` and set aside, never deleted. Raises ``CheckpointError`` when there are some and none can be
    trusted, when one has another format, and when the disk refuses.
    """
    with explained(f"the checkpoints in {folder} cannot be read", CheckpointError):
        if not folder.is_dir():
            return None
        _sweep(folder)
        for path in _steps(folder):
            try:
                return _read(path)
            except _Broken as problem:
                say(f"checkpoint {path} is broken: {problem}; it was set aside as {_set_aside(path).name}")
        if broken := sorted(path.name for path in folder.glob("broken-step-*")):
            raise CheckpointError(
                f"no checkpoint in {folder} can be trusted ({', '.join(broken)}), and going on without one would lose what was learnt; "
                "put a good copy in place under its name (step-...), or start the run anew with --fresh"
            )
        return None


def save_artifact(folder: Path, write: Callable[[Path], None]) -> dict[str, FileHash]:
    """Let ``write`` fill a folder that appears as ``folder`` only when it is whole, in place of an older one.

    Returns the hash of each file, for the manifest. Raises ``SaveError`` when the disk refuses.
    """
    with explained(f"{folder} cannot be written", SaveError, remedy=""):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent, f"{folder.name}-")
        with _appearing(folder, folder.with_name(f".tmp-{folder.name}-{os.getpid()}")) as temporary:
            write(temporary)
            hashes = _seal(temporary)
    return hashes


def verify(folder: Path, hashes: Mapping[str, FileHash]) -> None:
    """Check that an artifact is, file by file, what ``save_artifact`` wrote. Raises ``CheckpointError`` with the first difference."""
    with explained(f"{folder} cannot be read", CheckpointError):
        problem = difference(folder, hashes) if folder.is_dir() else "there is no such folder"
    if problem:
        raise CheckpointError(f"{folder} is not what its stage wrote: {problem}; restore it, or start the run anew with --fresh")


@contextmanager
def _appearing(target: Path, temporary: Path) -> Iterator[Path]:
    """A folder to fill: in one rename it becomes ``target`` when the block ends well, and it is gone when the block does not."""
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        sync_folder(temporary)
        replaced = _hidden(target) if target.exists() else None
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(target.parent)
    if replaced:
        shutil.rmtree(replaced)


def _seal(folder: Path) -> dict[str, FileHash]:
    """Wait until every file is on the disk; returns their hashes."""
    # safetensors makes files that only their owner may read. The folder was made under the umask, and says what is meant.
    mode = folder.stat().st_mode & 0o666
    hashes = hash_folder(folder)
    for name in hashes:
        (folder / name).chmod(mode)
        sync_file(folder / name)
    for inner in folder.rglob("*/"):
        sync_folder(inner)
    return hashes


def _write_tensors(folder: Path, states: Mapping[str, State]) -> None:
    from safetensors.torch import save_file

    for name, state in states.items():
        if state.tensors:
            save_file(_unshared(state.tensors), folder / f"{name}.safetensors")


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors wants them: on the CPU, contiguous, no two of them in the same memory (tied weights are)."""
    seen: set[int] = set()
    plain = {}
    for name, tensor in tensors.items():
        here = tensor.detach().cpu().contiguous()
        place = here.untyped_storage().data_ptr()
        plain[name] = here.clone() if place in seen else here
        seen.add(place)
    return plain


def _checked(target: Path, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in values.items():
        try:
            json.dumps(value, allow_nan=False)
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"{target} cannot be written: {key!r} in the state of {name!r} is not JSON ({error}); what was saved before is intact"
            ) from error
    return dict(values)


def _read(folder: Path) -> Checkpoint:
    """The checkpoint. Raises ``_Broken`` before anything of it is parsed but its manifest."""
    try:
        files = _manifest(folder)
        if problem := difference(folder, files, besides=[_MANIFEST]):
            raise _Broken(problem)
        values = json.loads((folder / _VALUES).read_text(encoding="utf-8"))
        return Checkpoint(_number(folder), {name: State(_tensors(folder, name, files), value) for name, value in values.items()})
    except PermissionError:
        raise  # Nothing is wrong with it.
    except OSError as error:
        raise _Broken(f"it cannot be read ({error})") from error


def _manifest(folder: Path) -> dict[str, FileHash]:
    if folder.is_symlink():
        raise _Broken("it is a symbolic link")
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        version, step = manifest["format"], manifest["step"]
        if isinstance(version, int) and version != FORMAT:
            raise CheckpointError(
                f"{folder} has format {version}, and this alignkit reads {FORMAT}; "
                "continue with the version that wrote it (run.json names it), or start the run anew with --fresh"
            )
        files = {name: FileHash(**facts) for name, facts in manifest["files"].items()}
    except FileNotFoundError as error:
        raise _Broken(f"it has no {_MANIFEST}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Broken(f"its {_MANIFEST} is damaged") from error
    if version != FORMAT or step != _number(folder) or _VALUES not in files:
        raise _Broken(f"its {_MANIFEST} is another's")
    return files


def _tensors(folder: Path, name: str, files: Mapping[str, FileHash]) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    file = f"{name}.safetensors"
    if file not in files:
        return {}
    # Cloned: what is loaded is the file itself; changed in place it would change them, and cut short it would end the process.
    return {key: tensor.clone() for key, tensor in load_file(folder / file).items()}


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _steps(folder: Path) -> list[Path]:
    """Checkpoints, newest first."""
    return sorted((path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name)), key=_number, reverse=True)


def _set_aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"broken-{path.name}" + (f"-{number}" if number > 1 else ""))).exists():
        number += 1
    return path.rename(aside)


def _sweep(folder: Path, prefix: str = "") -> None:
    """Remove what a killed process left half written or half removed."""
    for leftover in (*folder.glob(f".tmp-{prefix}*"), *folder.glob(f".del-{prefix}*")):
        shutil.rmtree(leftover, ignore_errors=True)


def _hidden(folder: Path) -> Path:
    """The folder, renamed before it is removed: a kill in the middle leaves no half checkpoint under a name that counts."""
    aside = folder.with_name(f".del-{folder.name}-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    return folder.rename(aside)


def _check_room(folder: Path, states: Mapping[str, State]) -> None:
    need = 1.05 * sum(tensor.numel() * tensor.element_size() for state in states.values() for tensor in state.tensors.values())
    free = shutil.disk_usage(folder).free
    if need > free:
        raise SaveError(f"a checkpoint in {folder} needs {need / 1e6:.1f} MB and {free / 1e6:.1f} MB are free")
