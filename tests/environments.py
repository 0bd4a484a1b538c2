"""Virtual environments for tests that install packages: made in a second, without a network, on top of this one's libraries."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest


def missing(what: str) -> NoReturn:
    """Skip the test, and say for want of what; in CI, which has installed everything, fail it."""
    if "CI" in os.environ:
        pytest.fail(f"{what}; CI installs it")
    pytest.skip(what)


@dataclass(frozen=True)
class Environment:
    """A virtual environment in ``folder``."""

    folder: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def run(self, *command: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ``python *command``; fails with the output unless it ends well, or ``check`` is off."""
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([self.python, *command], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done

    def alignkit(self, *arguments: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the ``alignkit`` command."""
        return self.run("-m", "alignkit", *arguments, cwd=cwd, check=check)

    def install(self, package: Path) -> None:
        """Install a folder or a wheel, and nothing that it depends on."""
        offline = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--ignore-installed")
        self.run("-m", "pip", "install", "--quiet", *offline, package, cwd=self.folder)


def make_environment(folder: Path, *, with_checkout: bool) -> Environment:
    """An environment that sees this one's libraries, and (``with_checkout``) what is installed here in editable mode: alignkit itself."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    here = sysconfig.get_path("purelib")
    there = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    # A plain line puts a folder on the path; addsitedir also obeys the .pth files in it, which is how an editable install is found.
    (Path(there) / "libraries.pth").write_text(f"import site; site.addsitedir({here!r})\n" if with_checkout else f"{here}\n")
    return Environment(folder)
