"""Small stand-ins that behave: tiny policies of three architectures, made once."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from alignkit.models import tiny
from alignkit.models.causal_lm import CausalPolicy, load
from alignkit.models.config import Precision, TinyLMConfig, TuningConfig

ARCHITECTURES = ("llama", "gpt2", "qwen2")


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """Removed when the interpreter ends."""
    return tempfile.TemporaryDirectory(prefix="alignkit-tests-")


def scratch(name: str) -> Path:
    """A place for what is made once and used by many tests."""
    return Path(_scratch().name) / name


@functools.cache
def tiny_folder(architecture: str = "llama", seed: int = 0) -> Path:
    """A transformers folder of a tiny random model, made once."""
    folder = scratch(f"{architecture}-{seed}")
    return tiny.prepare(TinyLMConfig(architecture=architecture, hidden_size=32, seed=seed), folder)


def tiny_policy(
    architecture: str = "llama", *, tuning: TuningConfig | None = None, precision: Precision = "float32", trainable: bool = True
) -> CausalPolicy:
    """A fresh tiny policy."""
    return load(tiny_folder(architecture), tuning=tuning or TuningConfig(), precision=precision, trainable=trainable, seed=0)
