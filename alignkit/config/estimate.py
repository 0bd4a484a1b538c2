"""A rough count of the memory and disk that a run will take, made without loading the model. Torch-free."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from alignkit.config.load import LoadedConfig

_GB = 1e9


@dataclass(frozen=True, slots=True)
class Estimate:
    """What was counted, line by line."""

    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines)


def estimate(loaded: LoadedConfig) -> Estimate:
    """Weights, gradients and moments of the models of the largest stage, float32, and what the run leaves on disk."""
    config = loaded.run.policy.config
    known = {f.name for f in dataclasses.fields(config)}
    parameters = _parameters(config.model) if "model" in known else None
    if parameters is None:
        return Estimate(("estimate: unknown, the model's size can only be read from a folder, a .gguf file or an installed package",))
    lora = "tuning" in known and config.tuning.kind == "lora"
    weights = 4 * parameters / _GB
    trained = 0.02 if lora else 1.0
    learning = weights + 3 * weights * trained
    rows = []
    for stage in loaded.run.stages:
        if stage.optimizer is None:
            rows.append((2 * weights, f"{stage.name}: two policies"))
        elif stage.reward is not None:
            reference = 0.0 if lora else weights
            rows.append(
                (2 * learning + reference + weights, f"{stage.name}: policy and critic with gradients and moments, reference, reward model")
            )
        else:
            rows.append((learning, f"{stage.name}: one model with gradients and moments"))
    largest = max(rows)
    artifacts = sum(stage.optimizer is not None for stage in loaded.run.stages) + 1
    kept = loaded.run.checkpoint.keep * max(0.0, (learning - weights if lora else 2 * learning))
    return Estimate(
        (
            f"estimate for {parameters / 1e6:.0f} million parameters, float32, {'adapters' if lora else 'all weights'} trained:",
            f"  memory {largest[0]:.1f} GB in the largest stage ({largest[1]}), and what batches take on top",
            f"  disk   {artifacts * weights + kept:.1f} GB ({artifacts} models of {weights:.2f} GB, and up to {loaded.run.checkpoint.keep} "
            "checkpoints)",
        )
    )


def _parameters(model: str) -> int | None:
    """Number of weights of a folder, a GGUF file or a package's file; None where it cannot be read here."""
    try:
        path = _path(model)
        if path is not None and path.is_file():
            return _gguf_parameters(path) if path.suffix == ".gguf" else None
        files = sorted(path.glob("*.safetensors")) if path is not None else []
        return sum(_safetensors_parameters(file) for file in files) if files else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error):
        # Not a model that can be read: whoever loads it will say so, and why. Here only a guess is missing.
        return None


def _path(model: str) -> Path | None:
    if not model.startswith("package:"):
        return Path(model)
    name, _, inner = model.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    roots = (spec.submodule_search_locations or []) if spec else []
    return next((Path(root) / inner for root in roots), None)


def _safetensors_parameters(path: Path) -> int:
    with path.open("rb") as handle:
        header: dict[str, Any] = json.loads(handle.read(struct.unpack("<Q", handle.read(8))[0]))
    return sum(prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def _gguf_parameters(path: Path) -> int:
    from gguf import GGUFReader

    return sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)
