"""Files that are either whole or not there: hashes, writes that are flushed to disk and renamed into place, and what a disk says no to."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.errors import AlignkitError, RunError

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
}


@dataclass(frozen=True, slots=True)
class FileHash:
    """What a file must be to be trusted."""

    sha256: str
    bytes: int


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def hash_folder(folder: Path) -> dict[str, FileHash]:
    """Every file below ``folder``, by its path inside it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): FileHash(sha256(path), path.stat().st_size) for path in files}


def difference(folder: Path, expected: Mapping[str, FileHash], *, besides: Sequence[str] = ()) -> str | None:
    """What is wrong with the files of ``folder``, in words; None if they are the ``expected`` ones and those in ``besides``.

    Only plain files inside the folder are opened, whatever paths ``expected`` holds. Hidden files that others put there do not count.
    """
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}
    for name in expected:
        if name not in found:
            return f"{name!r} is not a plain file in it" if os.path.lexists(folder / name) else f"{name} is missing"
    for name, path in found.items():
        if name not in expected and name not in besides and not path.name.startswith("."):
            return f"{name} does not belong to it"
    for name, file in expected.items():
        if (size := found[name].stat().st_size) != file.bytes:
            return f"{name} has {size} bytes instead of {file.bytes}"
    return next((f"{name} is not what was written" for name, file in expected.items() if sha256(found[name]) != file.sha256), None)


def read_json(path: Path) -> dict[str, Any]:
    """What ``write_json`` wrote. Raises ``RunError`` when the file is not there or was damaged since."""
    with explained(f"{path} cannot be read"):
        try:
            value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{path} is damaged: {error}; restore it, or start the run anew with --fresh") from error
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace ``path`` by the JSON of ``value`` in one step.

    Raises ``ValueError`` for numbers that JSON does not have (NaN, infinity), and ``RunError`` when the disk refuses.
    """
    with explained(f"{path} cannot be written"):
        write_text(path, json_text(value))


def json_text(value: Mapping[str, Any]) -> str:
    """JSON for people to read. Raises ``ValueError`` for numbers that it does not have."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one step. Raises ``OSError``; then ``path`` is what it was."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        # Half a surrogate pair, which data may hold, cannot be UTF-8; its escape is how JSON spells it.
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Wait until the file's content is on the disk."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the folder's entries are on the disk: without it a rename may be lost with the power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def explained(
    what: str, kind: Callable[[str], AlignkitError] = RunError, *, remedy: str = "; repair this and run the same command again"
) -> Iterator[None]:
    """Within, whatever the disk refuses becomes a ``kind`` that says ``what`` failed, why, and what to do."""
    from safetensors import SafetensorError

    try:
        yield
    # A full disk under safetensors is no OSError.
    except (OSError, SafetensorError) as error:
        raise kind(f"{what}: {_reason(error)}{remedy}") from error


def _reason(error: Exception) -> str:
    inside = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(inside[1]) if inside else None
    known = _REASONS.get(number or 0)
    return f"{known} ({error})" if known else str(error)
