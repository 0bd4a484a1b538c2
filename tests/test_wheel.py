"""The wheel holds all that is needed: installed where the checkout cannot be seen, it lists its plugins and runs a config."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.environments import Environment, make_environment

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the checkout."""
    target = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = target.glob("alignkit-*.whl")
    return wheel


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel, with the libraries it depends on and without the checkout."""
    environment = make_environment(tmp_path_factory.mktemp("wheel") / "venv", with_checkout=False)
    environment.install(wheel)
    return environment


def test_every_source_file_is_in_the_wheel(wheel: Path) -> None:
    packaged = set(ZipFile(wheel).namelist())
    sources = [path for folder in ("alignkit", "plugins") for path in (ROOT / folder).rglob("*") if path.is_file()]
    names = {str(path.relative_to(ROOT)).removeprefix("plugins/") for path in sources if "__pycache__" not in path.parts}
    assert names - packaged == set()


def test_the_checkout_is_out_of_sight(environment: Environment, tmp_path: Path) -> None:
    where = environment.run("-c", "import alignkit, alignkit_ppo; print(alignkit.__file__, alignkit_ppo.__file__)", cwd=tmp_path).stdout
    assert all(Path(path).is_relative_to(environment.folder) for path in where.split())


def test_plugins_are_found(environment: Environment, tmp_path: Path) -> None:
    listing = environment.alignkit("plugins", cwd=tmp_path).stdout
    assert {"sft", "reward_model", "ppo", "jsonl", "tiny_lm"} <= {line.split()[0] for line in listing.splitlines() if line.strip()}
    assert "no plugin failed to load" in listing


def test_the_smoke_config_runs_from_another_directory(environment: Environment, tmp_path: Path) -> None:
    configs = shutil.copytree(ROOT / "configs", tmp_path / "configs")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment.alignkit("run", configs / "smoke.yaml", f"dir={tmp_path / 'run'}", cwd=elsewhere)
    assert (tmp_path / "run" / "run.json").is_file()
