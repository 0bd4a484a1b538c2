"""alignkit aligns a language model with human feedback: supervised fine-tuning, a reward model, PPO, and what comes after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__version__ = "0.1.0"


def run(config: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Run (or continue) the run that ``config`` describes; the same as ``alignkit run``. Returns the run's folder.

    Raises ``alignkit.errors.AlignkitError`` for everything that the caller can repair.
    """
    from alignkit.runner import run_config

    return run_config(config, overrides)
