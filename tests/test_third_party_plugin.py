"""A stranger's package, installed next to alignkit: one that works, one that is broken, and one that alignkit wrote."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from alignkit.scaffold import write_plugin
from tests.environments import Environment, make_environment

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]

CONFIG = """
name: stranger
policy: {{kind: tiny_lm}}
stages:
  - name: tune
    optimizer: {{kind: ppo, iterations: 1, prompts: 1, minibatches: 1}}
    prompts: {{kind: jsonl, path: prompts.jsonl}}
    reward: {reward}
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """alignkit, the example, a broken package and a freshly written one, all installed."""
    folder = tmp_path_factory.mktemp("third_party")
    environment = make_environment(folder / "venv", with_checkout=True)
    broken, written = write_plugin("acme-broken", folder), write_plugin("acme-written", folder)
    declaration = broken / "acme_broken" / "__init__.py"
    declaration.write_text("import module_that_acme_forgot_to_require\n" + declaration.read_text().replace("from __future__", "# from"))
    # Built from a copy: building leaves nothing in the checkout.
    example = shutil.copytree(ROOT / "examples" / "acme_brevity", folder / "acme_brevity")
    for package in (example, broken, written):
        environment.install(package)
    return environment


def write_config(folder: Path, reward: str) -> Path:
    (folder / "prompts.jsonl").write_text('{"prompt": "What is the capital of France?"}\n')
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(reward=reward))
    return path


def test_plugins_lists_the_strangers_and_explains_the_broken_one(environment: Environment, tmp_path: Path) -> None:
    listing = environment.alignkit("plugins", cwd=tmp_path).stdout
    line = next(line for line in listing.splitlines() if line.split()[:1] == ["acme_brevity"])
    assert "acme-brevity 0.1.0" in line
    assert "short answers score higher" in line
    failed = listing[listing.index("failed to load") :]
    assert "acme_broken (package acme-broken): ModuleNotFoundError: No module named 'module_that_acme_forgot_to_require'" in failed
    assert "pip uninstall acme-broken" in failed


def test_check_accepts_a_config_that_uses_the_plugin(environment: Environment, tmp_path: Path) -> None:
    config = write_config(tmp_path, "{kind: acme_brevity, target_words: 7}")
    assert "7" in environment.alignkit("check", config, cwd=tmp_path).stdout


def test_check_finds_mistakes_in_the_plugins_keys(environment: Environment, tmp_path: Path) -> None:
    config = write_config(tmp_path, "{kind: acme_brevity, target_word: 7}")
    done = environment.alignkit("check", config, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "config.yaml:8:" in done.stderr
    assert "target_words" in done.stderr


def test_a_config_that_uses_the_broken_plugin_is_told_why(environment: Environment, tmp_path: Path) -> None:
    config = write_config(tmp_path, "{kind: acme_broken}")
    done = environment.alignkit("check", config, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "module_that_acme_forgot_to_require" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("package", ["acme_brevity", "acme-written"])
def test_the_packages_own_tests_pass(environment: Environment, package: str) -> None:
    folder = environment.folder.parent / package
    done = environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", folder, cwd=folder)
    assert "9 passed" in done.stdout, done.stdout
