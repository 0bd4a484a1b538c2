"""One way to an export, for the command, the route and a run's data: what is there under its name, or else made now, once and for all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from alignkit.files import explained, sha256, sync_folder, write_json
from alignkit_serve.dataset import RULE_VERSION, parquet
from alignkit_serve.dataset.conversion import Converted, convert
from alignkit_serve.dataset.filters import Filters, Shape, Split
from alignkit_serve.dataset.split import salt_sha256
from alignkit_serve.store import Store, StoreError, exports, judged, new_id, secrets
from alignkit_serve.store.exports import Export
from alignkit_serve.store.values import plain

ROWS = "rows.parquet"
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """An export as it is asked for."""

    name: str
    shape: Shape
    split: Split
    filters: Filters

    def __str__(self) -> str:
        return f"the export {self.name!r} of {self.shape}, {self.split}"


def obtain(store: Store, wanted: Wanted, folder: Path) -> tuple[Export, Path]:
    """The export and its file, from the first call on the same to the bit, whatever feedback comes; the first call makes it in ``folder``.

    Raises ``StoreError`` where there is nothing to export, where the name stands for other filters, and where what was exported is
    erased since, missing or changed.
    """
    found = store.read(lambda connection: exports.find(connection, wanted.name, wanted.shape, wanted.split))
    found = found or _make(store, wanted, folder)
    _same(found, wanted)
    return found, _whole(store, found)


def _make(store: Store, wanted: Wanted, folder: Path) -> Export:
    salt = store.write(lambda connection: secrets.secret(connection, "split")).result()
    evidence = store.read(lambda connection: judged.collect(connection, wanted.filters, wanted.shape))
    converted = convert(evidence, wanted.shape, wanted.split, wanted.filters, salt)
    if not converted.rows:
        silent = store.read(lambda connection: judged.without_consent(connection, wanted.filters))
        raise StoreError(f"{wanted} would have no rows: {_why_none(converted, silent)}")
    id = new_id("exp-")
    place = folder.resolve() / wanted.name / f"{wanted.shape}-{wanted.split}-{id[-8:]}"
    with explained(f"{wanted} cannot be written to {place}", StoreError):
        export = _write(place, id, wanted, converted, salt_sha256(salt))
    kept = None
    try:
        kept = store.write(lambda connection: _record(connection, export, converted)).result()
    finally:
        if kept != export:
            shutil.rmtree(place)
    return kept


def _write(place: Path, id: str, wanted: Wanted, converted: Converted, salt: str) -> Export:
    """The folder of an export, which is there when all of it is."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=place.parent))
    try:
        temporary.chmod(0o755)
        parquet.write(temporary / ROWS, wanted.shape, wanted.filters.form, converted.rows)
        export = Export(
            id=id,
            name=wanted.name,
            shape=wanted.shape,
            split=wanted.split,
            rule_version=RULE_VERSION,
            filters=plain(wanted.filters.as_json()),
            split_salt=salt,
            sha256=sha256(temporary / ROWS),
            n_rows=len(converted.rows),
            counts=plain(converted.report()),
            path=str(place),
            created_at=datetime.now(UTC),
        )
        write_json(temporary / MANIFEST, manifest(export))
        temporary.rename(place)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    sync_folder(place.parent)
    return export


def manifest(export: Export) -> dict[str, Any]:
    """What an export says of itself, beside its rows."""
    return {
        "id": export.id,
        "name": export.name,
        "shape": export.shape,
        "split": export.split,
        "rule_version": export.rule_version,
        "sha256": export.sha256,
        "created_at": export.created_at.isoformat(),
        "filters": dict(export.filters),
        "consent": judged.CONSENT,
        "split_salt_sha256": export.split_salt,
        **export.counts,
    }


def _record(connection: Connection, export: Export, converted: Converted) -> Export:
    """Note the export, unless somebody else was faster: then it is theirs."""
    if faster := exports.find(connection, export.name, export.shape, export.split):
        return faster
    exports.add(connection, export, ((row.feedback, row.weight) for row in converted.rows))
    if exports.erased(connection, export.id, {id for row in converted.rows for id in row.inferences}):
        raise StoreError(f"something was erased while the export {export.name!r} was made; make it again")
    return export


def _same(found: Export, wanted: Wanted) -> None:
    asked: Mapping[str, Any] = plain(wanted.filters.as_json())
    differ = [f"{name} is {found.filters.get(name)!r}, not {value!r}" for name, value in asked.items() if found.filters.get(name) != value]
    if differ:
        raise StoreError(f"{wanted} was made with other filters: there {', '.join(differ)}; ask as it was made, or choose another name")


def _whole(store: Store, found: Export) -> Path:
    """The file of an export, if it is what was written and may still be used."""
    which = f"the export {found.name!r} of {found.shape}, {found.split},"
    again = "make another one under a new name"
    if found.tainted_at:
        raise StoreError(f"{which} is tainted since {found.tainted_at:%Y-%m-%d %H:%M}: something in it was erased; {again}")
    path = Path(found.path) / ROWS
    with explained(f"{which} cannot be read", StoreError, remedy=f"bring its file back, or {again}"):
        if sha256(path) != found.sha256:
            raise StoreError(f"{which} is not what was written: {path} was changed; bring it back, or {again}")
        ids = list(parquet.inferences(path))
    if store.read(lambda connection: exports.erased(connection, found.id, ids)):
        raise StoreError(f"{which} holds what was erased since; {again}")
    return path


def _why_none(converted: Converted, silent: int) -> str:
    counts = converted.report()["feedback"]["dropped"]
    reasons = [f"{count} {reason}" for reason, count in counts.items()]
    if silent:
        reasons.append(f"{silent} of inferences without consent to training")
    remedy = " (probation: 0 trusts every annotator at once)" if "probation" in counts else ""
    return f"of the feedback, {', '.join(reasons)}{remedy}" if reasons else "there is no feedback of a kind that makes such rows"
