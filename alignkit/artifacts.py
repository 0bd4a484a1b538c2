"""What the finished stages of a run left behind: folders that are checked before anything is built upon them, and who asked for which."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignkit.checkpoint import verify
from alignkit.checks import same_template
from alignkit.files import FileHash, hash_folder, read_json, sha256, write_json
from alignkit.interfaces import PolicySpec
from alignkit.settings import Component


class Artifacts:
    """The artifacts of the run in ``run``, whose own model is ``policy``'s."""

    def __init__(self, run: Path, spec: PolicySpec, policy: Component[Any], say: Callable[[str], None]) -> None:
        self._run, self._spec, self._policy, self._say = run, spec, policy, say
        self._used: set[str] = set()
        self._verified: set[Path] = set()

    def begin(self) -> None:
        """Whatever is asked for from now on is a parent of the next stage."""
        self._used.clear()

    def folder(self, stage: str | None) -> Path:
        """The folder of a finished stage's policy or reward model; None: the run's own model, prepared on first use.

        What the run wrote is checked against the hashes it was written with. Raises ``CheckpointError`` when a file has changed.
        """
        if stage is None:
            folder, hashes = self._own_model()
        else:
            self._used.add(stage)
            manifest = self._manifest(stage)
            folder, hashes = self._run / stage / manifest["makes"], manifest["files"]
        if folder not in self._verified and folder.is_relative_to(self._run):
            verify(folder, {name: FileHash(**facts) for name, facts in hashes.items()})
            self._verified.add(folder)
        return folder

    def parents(self) -> dict[str, str]:
        """The hash of the manifest of each stage that was asked for."""
        return {name: sha256(self._run / name / "manifest.json") for name in sorted(self._used)}

    def check_templates(self, here: str) -> None:
        """The stages that were asked for write a conversation in the same tokens. Raises ``RunError`` where one does not."""
        for name in sorted(self._used):
            same_template(here, self._manifest(name)["template_hash"], name)

    def _own_model(self) -> tuple[Path, dict[str, Any]]:
        note = self._run / "model.json"
        if not note.is_file():
            self._say("reading the model")
            path = self._spec.prepare(self._policy.config, self._run / "model")
            # Inside the run's folder it is known by its place there, so that the folder can be moved.
            known = path.relative_to(self._run) if path.is_relative_to(self._run) else path.resolve()
            write_json(note, {"path": str(known), "files": facts(hash_folder(path))})
        found = read_json(note)
        return self._run / found["path"], found["files"]

    def _manifest(self, stage: str) -> dict[str, Any]:
        return read_json(self._run / stage / "manifest.json")


def facts(hashes: Mapping[str, FileHash]) -> dict[str, Any]:
    """Files by name, as a manifest holds them."""
    return {name: asdict(found) for name, found in hashes.items()}
