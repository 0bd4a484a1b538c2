"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import alignkit
from alignkit.cli import cli
from alignkit.errors import ConfigError, Interrupted
from alignkit.testing.imports import HEAVY

ROOT = Path(__file__).parents[1]

COMMANDS = ["run", "check", "plugins", "schema", "new", "data", "init", "report"]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, prog_name="alignkit")


def replace_run(monkeypatch: pytest.MonkeyPatch, run_config: Any) -> None:
    """``alignkit run`` calls ``run_config``, and no runner is imported."""
    monkeypatch.setitem(sys.modules, "alignkit.runner", SimpleNamespace(run_config=run_config))


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Result:
    """What ``alignkit run`` does when the run raises ``error``."""

    def run_config(config: Path, overrides: Sequence[str], *, fresh: bool, accept_changes: bool) -> None:
        raise error

    replace_run(monkeypatch, run_config)
    return invoke("run", "config.yaml")


def modules_after(*arguments: str) -> set[str]:
    """Top-level packages that a fresh interpreter has imported when the command is done."""
    program = (
        "import json, sys\nfrom alignkit.cli import cli\n"
        "try:\n    cli(sys.argv[1:])\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "print('\\n' + json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_help_lists_every_command_in_full_sentences() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert sorted(cli.commands) == sorted(COMMANDS)
    assert "..." not in result.output.replace("[ARGS]...", ""), "the first line of a command's help is too long"


@pytest.mark.parametrize("command", [["--help"], ["run", "--help"], ["--version"], ["plugins"]])
def test_quick_commands_import_nothing_heavy(command: list[str]) -> None:
    assert modules_after(*command) & set(HEAVY) == set()


def test_check_imports_nothing_heavy() -> None:
    assert modules_after("check", str(ROOT / "configs" / "smoke.yaml")) & set(HEAVY) == set()


def test_the_version_is_the_packages() -> None:
    assert invoke("--version").output == f"alignkit {alignkit.__version__}\n"


def test_an_unknown_command_gets_a_suggestion() -> None:
    result = invoke("plugin")
    assert result.exit_code == 2
    assert "No such command 'plugin'" in result.stderr
    assert "'plugins'" in result.stderr


def test_run_passes_overrides_and_options(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    replace_run(monkeypatch, lambda config, overrides, **options: calls.append((config, overrides, options)))
    assert invoke("run", "config.yaml", "seed=3", "ppo.optimizer.kl.coef=0.1", "--fresh").exit_code == 0
    assert invoke("run", "config.yaml", "--accept-changes").exit_code == 0
    assert calls == [
        (Path("config.yaml"), ("seed=3", "ppo.optimizer.kl.coef=0.1"), {"fresh": True, "accept_changes": False}),
        (Path("config.yaml"), (), {"fresh": False, "accept_changes": True}),
    ]


def test_init_says_what_comes_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "alignkit.quickstart", SimpleNamespace(init=lambda folder: folder / "quickstart.yaml"))
    assert invoke("init", "quickstart", "--dir", "demo").output == "next: alignkit run demo/quickstart.yaml\n"


def test_report_says_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "alignkit.report", SimpleNamespace(write_report=lambda run: run / "report.html"))
    assert invoke("report", "runs/demo").output == "wrote runs/demo/report.html\n"


def test_preview_shows_rows_of_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    def preview(loaded: Any, registry: Any, stage: str, rows: int) -> str:
        return f"{rows} rows of {stage} of {loaded.run.name}"

    monkeypatch.setitem(sys.modules, "alignkit.data.preview", SimpleNamespace(preview=preview))
    assert invoke("data", "preview", str(ROOT / "configs" / "smoke.yaml"), "sft", "--rows", "2").output == "2 rows of sft of smoke\n"


def test_a_mistake_is_told_on_stderr_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    result = raising(monkeypatch, ConfigError(["a.yaml:1:2: seed is -1", "a.yaml:3:4: steps is 0"]))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == "error: a.yaml:1:2: seed is -1\na.yaml:3:4: steps is 0\n"


def test_an_interrupted_run_ends_with_its_own_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    result = raising(monkeypatch, Interrupted("saved at step 3; the same command continues", 143))
    assert (result.exit_code, result.stderr) == (143, "saved at step 3; the same command continues\n")


def test_control_c_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    result = raising(monkeypatch, KeyboardInterrupt())
    assert (result.exit_code, result.stderr) == (130, "\ninterrupted\n")


def test_a_bug_is_shown_in_full_with_a_plea(monkeypatch: pytest.MonkeyPatch) -> None:
    result = raising(monkeypatch, ZeroDivisionError("division by zero"))
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "ZeroDivisionError: division by zero\nbug: this is alignkit's fault; please report it" in result.stderr


def test_an_error_of_click_stays_clicks(monkeypatch: pytest.MonkeyPatch) -> None:
    result = raising(monkeypatch, click.UsageError("not like this"))
    assert result.exit_code == 2
    assert "Error: not like this" in result.stderr


def test_a_reader_that_has_gone_is_no_error() -> None:
    """``alignkit schema | head -1``."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = f"'{sys.executable}' -m alignkit schema | head -c 1"
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout, done.stderr) == ("{", "")


def test_plugins_lists_the_cores_own_kinds() -> None:
    result = invoke("plugins")
    assert result.exit_code == 0
    assert "data sources\n" in result.output
    line = next(line for line in result.output.splitlines() if line.strip().startswith("jsonl "))
    assert f"alignkit {alignkit.__version__}" in line


def test_the_schema_is_json_and_may_go_to_a_file(tmp_path: Path) -> None:
    printed = invoke("schema")
    assert printed.exit_code == 0
    assert "properties" in json.loads(printed.stdout)
    target = tmp_path / "schema.json"
    assert invoke("schema", "--output", str(target)).exit_code == 0
    assert target.read_text() == printed.stdout


def test_check_shows_the_config_with_what_it_will_take(tmp_path: Path) -> None:
    result = invoke("check", str(ROOT / "configs" / "smoke.yaml"))
    assert result.exit_code == 0, result.output
    assert "seed" in result.stdout


def test_check_tells_a_wrong_key(tmp_path: Path) -> None:
    config = tmp_path / "wrong.yaml"
    config.write_text("name: x\npolicy: {kind: tiny_lm}\nstages: []\nsede: 3\n")
    result = invoke("check", str(config))
    assert result.exit_code == 2
    assert "wrong.yaml:4:" in result.stderr
    assert 'did you mean "seed"?' in result.stderr


def test_a_missing_config_is_a_mistake_and_not_a_bug() -> None:
    result = invoke("check", "nowhere/at-all.yaml")
    assert result.exit_code == 2
    assert "nowhere/at-all.yaml" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["Acme", "1acme", "acme brevity", "../acme", "class", "json", "alignkit", "acme-"])
def test_a_plugin_cannot_have_just_any_name(name: str, tmp_path: Path) -> None:
    result = invoke("new", "plugin", name, "--dir", str(tmp_path))
    assert result.exit_code == 2
    assert name in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_new_plugin_never_overwrites(tmp_path: Path) -> None:
    assert invoke("new", "plugin", "acme-tone", "--dir", str(tmp_path)).exit_code == 0
    declaration = tmp_path / "acme-tone" / "acme_tone" / "__init__.py"
    declaration.write_text("mine")
    result = invoke("new", "plugin", "acme-tone", "--dir", str(tmp_path))
    assert result.exit_code == 2
    assert "is there already" in result.stderr
    assert declaration.read_text() == "mine"
