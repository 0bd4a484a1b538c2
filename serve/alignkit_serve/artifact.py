"""From what an operator names to a policy's folder, and what must hold before it may answer: its files, its template, its numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from alignkit.api import AlignkitError
from alignkit.files import FileHash, difference, hash_folder, read_json
from alignkit.models.config import Precision

_BOUND_NATS = {"float32": 1e-3, "bfloat16": 0.25}
"""How far log-probabilities of the probes may be from the trainer's: what other products in the same precision amount to, or in the
coarser one of two."""

_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


class ArtifactError(AlignkitError):
    """A folder that cannot be served."""


class GateError(AlignkitError):
    """A policy that is not what its trainer wrote, or does not compute what its trainer computed."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A policy on disk. ``name`` says where it comes from, ``manifest`` is its stage's, None for a folder of another's making.

    ``precision`` is what its run asked for; ``trained_in`` what that was on the trainer's machine.
    """

    folder: Path
    name: str
    manifest: Mapping[str, Any] | None
    precision: Precision = "auto"
    trained_in: Precision = "float32"

    @property
    def manifest_sha256(self) -> str | None:
        """The hash of the stage's manifest, which names the hashes of all files."""
        return None if self.manifest is None else hashlib.sha256((self.folder.parent / "manifest.json").read_bytes()).hexdigest()


def locate(path: Path) -> Artifact:
    """The policy that ``path`` means: a run (the last policy that it made), a stage, its policy, or any transformers folder.

    Raises ``ArtifactError`` that says what was found and what is allowed.
    """
    try:
        return _located(path.resolve())
    except OSError as error:
        raise ArtifactError(f"{str(path)[:200]} cannot be read: {error.strerror}") from error


def _located(path: Path) -> Artifact:
    if (path / "run.json").is_file():
        return _of_run(path)
    if (path / "manifest.json").is_file() and "stage" in read_json(path / "manifest.json"):
        return _of_stage(path)
    if (path / "config.json").is_file():
        if (path.parent / "manifest.json").is_file() and read_json(path.parent / "manifest.json").get("makes") == path.name:
            return _of_stage(path.parent)
        return Artifact(path, path.name, None)
    what = (
        "an empty folder" if path.is_dir() and not any(path.iterdir()) else "a folder of something else" if path.is_dir() else "not there"
    )
    raise ArtifactError(f"{path} is {what}; allowed: a run's folder, one of its stages, or a transformers folder (with config.json)")


def _of_run(run: Path) -> Artifact:
    stages = [stage["name"] for stage in read_json(run / "run.json")["config"]["stages"]]
    finished = [name for name in stages if (run / name / "manifest.json").is_file()]
    makers = [name for name in finished if read_json(run / name / "manifest.json")["makes"] == "policy"]
    if not makers:
        raise ArtifactError(
            f"{run}: no stage of this run has made a policy yet (finished: {', '.join(finished) or 'none'} of {', '.join(stages)}); "
            "let `alignkit run` go on first"
        )
    return _of_stage(run / makers[-1])


def _of_stage(stage: Path) -> Artifact:
    manifest = read_json(stage / "manifest.json")
    if manifest["makes"] != "policy":
        raise ArtifactError(f"{stage} made a {manifest['makes'].replace('_', ' ')}, which cannot answer; name a stage that made a policy")
    name = f"{stage.parent.name}-{stage.name}"
    if not (stage.parent / "run.json").is_file():
        return Artifact(stage / "policy", name, manifest)
    run = read_json(stage.parent / "run.json")
    precision = run["config"]["policy"].get("precision", "auto")
    found_faster = run["choices"].get("kernels", {}).get("bfloat16", False)
    trained_in = precision if precision != "auto" else "bfloat16" if found_faster else "float32"
    return Artifact(stage / "policy", name, manifest, cast(Precision, precision), cast(Precision, trained_in))


@dataclass(frozen=True, slots=True)
class Content:
    """What a policy is, by its bytes: the same files are the same policy, wherever they lie."""

    version: str
    files: Mapping[str, FileHash]
    tokenizer_sha256: str


def read_content(artifact: Artifact) -> Content:
    """Hash every file, and compare with the manifest where there is one. Raises ``GateError`` with the first difference."""
    if artifact.manifest is not None:
        expected = {name: FileHash(**facts) for name, facts in artifact.manifest["files"].items()}
        problem = difference(artifact.folder, expected) if artifact.folder.is_dir() else "there is no such folder"
        if problem:
            raise GateError(f"{artifact.folder} is not what its stage wrote: {problem}")
        files: Mapping[str, FileHash] = expected
    else:
        files = hash_folder(artifact.folder)
    if not any(name.endswith(".safetensors") for name in files):
        raise ArtifactError(f"{artifact.folder} holds no safetensors weights, and nothing else is loaded")
    return Content(_digest(files, files)[:12], files, _digest(files, [name for name in files if name in _TOKENIZER]))


def _digest(files: Mapping[str, FileHash], names: Sequence[str] | Mapping[str, FileHash]) -> str:
    return hashlib.sha256(json.dumps({name: files[name].sha256 for name in sorted(names)}, sort_keys=True).encode()).hexdigest()


def check_template(artifact: Artifact, template_hash: str) -> None:
    """Whether a conversation becomes the same tokens here as it did in training. Raises ``GateError``."""
    if artifact.manifest is not None and template_hash != artifact.manifest["template_hash"]:
        raise GateError(
            f"{artifact.name}: the chat template, special tokens or stop tokens are not the trainer's "
            f"(hash {template_hash[:12]} instead of {artifact.manifest['template_hash'][:12]}); other releases of the libraries may be why"
        )


async def probe(artifact: Artifact, precision: str, score: Callable[[Sequence[int]], Awaitable[Sequence[float]]]) -> float | None:
    """The largest gap between the trainer's log-probabilities of the manifest's probes and those of ``score``; None without probes.

    Raises ``GateError`` when it is beyond what other products in this precision, or in the trainer's, amount to.
    """
    if artifact.manifest is None or not artifact.manifest["probes"]:
        return None
    gaps = [
        abs(ours - theirs)
        for one in artifact.manifest["probes"]
        for ours, theirs in zip(await score(one["ids"]), one["logprobs"], strict=True)
    ]
    bound = max(_BOUND_NATS[precision], _BOUND_NATS[artifact.trained_in])
    # Not `largest > bound`: a NaN is as far off as anything.
    if not (largest := max(gaps, default=0.0)) <= bound:
        raise GateError(
            f"{artifact.name}: log-probabilities of the probes are up to {largest:.2g} nats from the trainer's; allowed: {bound:g}. "
            "The weights were not read as they were written, or this machine computes otherwise"
        )
    return largest
