"""Asserts what an import brings along, in a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

HEAVY = ("torch", "transformers", "datasets", "peft", "tokenizers", "safetensors", "numpy", "pandas", "pyarrow", "gguf")
"""Top-level packages that make a command wait; they are imported inside ``build`` and the like."""


def assert_light(modules: Sequence[str]) -> None:
    """Fails when importing ``modules`` imports anything heavy, and says which one did it."""
    program = (
        "import importlib, sys\n"
        f"for name in {list(modules)!r}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = sorted(set({HEAVY!r}) & set(sys.modules))\n"
        "    if heavy: sys.exit(f'importing {name} imports {\", \".join(heavy)}; import it inside the function that needs it')\n"
    )
    run_fresh(program)


def run_fresh(program: str, *arguments: str) -> None:
    """Run a Python program in a fresh interpreter that finds the same modules; fails with what it wrote to stderr."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr.strip()
