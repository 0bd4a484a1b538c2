"""What users get wrong, through the real command line: exit code 2, a message with its place, and never a traceback."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from alignkit.cli import cli

ROOT = Path(__file__).parents[1]
CONFIG = "smoke.yaml"
Change = Callable[[Path], None]


@dataclass(frozen=True)
class Mistake:
    """``make`` does it in a folder that holds the smoke config; ``says`` are parts of what must be told, ``command`` is what is run."""

    name: str
    make: Change
    says: tuple[str, ...]
    command: tuple[str, ...] = ("check", CONFIG)
    code: int = 2


def edit(old: str, new: str, file: str = CONFIG) -> Change:
    def change(folder: Path) -> None:
        text = (folder / file).read_text(encoding="utf-8")
        assert old in text, f"{file} holds no {old!r}: the mistake cannot be made"
        (folder / file).write_text(text.replace(old, new, 1), encoding="utf-8")

    return change


def write(file: str, content: str | bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def line(file: str, number: int, content: str) -> Change:
    def change(folder: Path) -> None:
        lines = (folder / file).read_text(encoding="utf-8").split("\n")
        lines[number - 1] = content
        (folder / file).write_text("\n".join(lines), encoding="utf-8")

    return change


def broken_run(folder: Path) -> None:
    (folder / "out").mkdir()
    write("out/run.json", "{")(folder)


def file_for_stage(folder: Path) -> None:
    (folder / "out").mkdir()
    write("out/sft", "")(folder)


def nothing(folder: Path) -> None:
    """The command line itself is the mistake."""


def run(*overrides: str) -> tuple[str, ...]:
    return ("run", CONFIG, "dir=out", *overrides)


def check(*overrides: str) -> tuple[str, ...]:
    return ("check", CONFIG, *overrides)


DEMONSTRATIONS, RANKINGS, PROMPTS = "smoke/demonstrations.jsonl", "smoke/rankings.jsonl", "smoke/prompts.jsonl"
MODEL = "policy: {kind: tiny_lm}"

MISTAKES = [
    # The file
    Mistake("no such config", nothing, ("smok.yaml: cannot be read: No such file", 'did you mean "smoke.yaml"?'), ("check", "smok.yaml")),
    Mistake("a folder as config", nothing, ("smoke: is a folder",), ("check", "smoke")),
    Mistake("an empty config", write(CONFIG, ""), ("smoke.yaml:1:1: the file is empty",)),
    Mistake("a binary config", write(CONFIG, b"\xff\xfe\x00"), ("smoke.yaml: not UTF-8 text (byte 0)",)),
    Mistake("a list as config", write(CONFIG, "- name: x\n"), ("smoke.yaml:1:1: a config is a mapping",)),
    # YAML
    Mistake("a tab", edit("seed: 7", "seed: 7\n\tthreads: 1"), ("smoke.yaml:6:1: not YAML", "YAML has no tabs")),
    Mistake("an open bracket", edit("policy: {kind: tiny_lm}", "policy: {kind: tiny_lm"), ("smoke.yaml:9:7: not YAML",)),
    Mistake("a key twice", edit("seed: 7", "seed: 7\nseed: 8"), ("smoke.yaml:6:1:", '"seed" stands here a second time')),
    Mistake("a merge key", edit("{coef: 0.05}", "{<<: {coef: 0.05}}"), ("smoke.yaml:31:12:", "merge key << is not supported")),
    # Values
    Mistake("a quoted number", edit("seed: 7", 'seed: "7"'), ('smoke.yaml:5:7: seed is "7"; allowed: a whole number',)),
    Mistake("yes", edit("coef: 0.05}", "coef: 0.05}\n      whiten_rewards: yes"), ('is "yes"; allowed: true or false',)),
    Mistake("an empty value", edit("seed: 7", "seed:"), ("smoke.yaml:5:1: seed is empty; allowed: a whole number",)),
    Mistake("out of range",
             edit("coef: 0.05", "coef: -1"), ("smoke.yaml:31:18: ppo.optimizer.kl.coef is -1.0; allowed: a number at least 0",)),
    Mistake("a list for a mapping", edit("{coef: 0.05}", "[0.05]"), ("ppo.optimizer.kl is a list; allowed: a mapping",)),
    Mistake("no choice of these", edit("coef: 0.05", "kind: k4"), ('ppo.optimizer.kl.kind is "k4"; allowed: fixed, adaptive',)),
    Mistake("two that do not fit", edit("minibatches: 2", "minibatches: 99"), ("smoke.yaml:28:20: ppo.optimizer.minibatches is 99",)),
    # Keys and kinds
    Mistake("a misspelt key", edit("seed: 7", "sede: 7"), ("smoke.yaml:5:1: sede is not a key", 'did you mean "seed"?')),
    Mistake("a misspelt key deep inside", edit("{coef: 0.05}", "{coeff: 0.05}"), ("smoke.yaml:31:12: ppo.optimizer.kl.coeff", '"coef"?')),
    Mistake("a missing key", edit("name: smoke\n", ""), ("smoke.yaml:3:1: the key name is missing",)),
    Mistake("an unknown kind", edit("kind: ppo", "kind: pppo"), ('no optimizer of kind "pppo"', 'did you mean "ppo"?', "installed: ")),
    Mistake("no kind", edit("{kind: tiny_lm}", "{layers: 2}"), ("smoke.yaml:7:9: policy has no kind; allowed: causal_lm, live, tiny_lm",)),
    Mistake("an interpolation into nothing", edit("runs/smoke", "runs/${nam}"), ("smoke.yaml:4:6:", "'nam' not found")),
    Mistake("no function", edit("{kind: reward_model, stage: reward}", "{kind: python, function: f}"), ("allowed: module:function",)),
    # Stages
    Mistake("a stage that is not there", edit("init: reward", "init: rewrd"), ("smoke.yaml:30:22:", 'did you mean "reward"?')),
    Mistake("a later stage", edit("start: sft", "start: ppo"), ("which does not come before this one",)),
    Mistake("a policy for a reward model", edit("stage: reward", "stage: sft"), ('ppo.reward.stage is "sft", which makes a policy',)),
    Mistake("a reward model for a policy",
             edit("candidate: ppo", "candidate: reward"), ("smoke.yaml:38:18:", "which makes a reward model")),
    Mistake("a name twice", edit("name: reward", "name: sft"), ('smoke.yaml:15:11: the name "sft" is taken',)),
    Mistake("a stage named like a key", edit("name: compare", "name: seed"), ('a stage cannot be named "seed"',)),
    Mistake("ppo without a reward",
             edit("    reward: {kind: reward_model, stage: reward}\n", ""), ("ppo has no reward", "learns from rollouts")),
    Mistake("no stages", write(CONFIG, f"name: x\n{MODEL}\nstages: []\n"), ("smoke.yaml:3:9: stages is empty",)),
    # Overrides
    Mistake("an override without a value", nothing, ('override "seed": write it as key=value',), check("seed")),
    Mistake("an override of an unknown stage", nothing, ('no stage or key "pppo" (did you mean "ppo"?)',), check("pppo.max_length=9")),
    Mistake("an override of an unknown key", nothing, ('override "sede=3": sede is not a key',), check("sede=3")),
    Mistake("an override beyond a list", nothing, ("stages has no entry 9",), check("stages.9.max_length=9")),
    Mistake("an override below a value", nothing, ("name is a single value and has no keys",), check("name.x=3")),
    Mistake("an override of another type", nothing, ('override "seed=x": seed is "x"; allowed: a whole number',), check("seed=x")),
    # Data
    Mistake("no such data", lambda folder: (folder / PROMPTS).unlink(), ("smoke.yaml:33:34: ppo.prompts.path is", "no such file")),
    Mistake("a row that is not JSON", line(DEMONSTRATIONS, 3, '{"prompt": '), (f"{DEMONSTRATIONS}:3:", 'not JSON', '{"prompt":'), run()),
    Mistake("a row that is a list", line(DEMONSTRATIONS, 2, "[1]"), (f"{DEMONSTRATIONS}:2: a row must be a JSON object", "[1]"), run()),
    Mistake("a row without its keys", line(DEMONSTRATIONS, 2, '{"text": "a"}'), (f"{DEMONSTRATIONS}:2", "completion", "text"), run()),
    Mistake("rankings as demonstrations", edit("smoke/demonstrations.jsonl", RANKINGS), (f"{RANKINGS}:1", "completion"), run()),
    Mistake("no rows", write(DEMONSTRATIONS, "\n"), (f"{DEMONSTRATIONS}: there are no rows in it",), run()),
    Mistake("data that is not text", write(DEMONSTRATIONS, b"\xff\xfe"), (f"{DEMONSTRATIONS}:1: not UTF-8 text",), run()),
    Mistake("a folder as data", edit("path: smoke/demonstrations.jsonl", "path: smoke"), ("smoke: cannot be read: Is a directory",), run()),
    Mistake("no Parquet",
             edit("data: {kind: jsonl", "data: {kind: parquet"), (f"{DEMONSTRATIONS}: cannot be read as a Parquet file",), run()),
    Mistake("rows that are too long", nothing, ("max_length",), run("sft.max_length=2")),
    # Models and functions
    Mistake("no such package", edit("tiny_lm}", "causal_lm, model: 'package:nope_nope/x.gguf'}"), ("'nope_nope' is not installed",), run()),
    Mistake("no such file", edit("tiny_lm}", "causal_lm, model: nope.gguf}"), ("model 'nope.gguf': there is no such file",), run()),
    Mistake("no model", edit("tiny_lm}", "causal_lm, model: smoke}"), ("model", "smoke", "cannot be loaded"), run()),
    # The run's folder
    Mistake("a file in the run's place", write("out", ""), ("the run's folder out cannot be written: ", "dir=PATH"), run()),
    Mistake("a file above the run's place", write("file", ""), ("cannot be written: Not a directory",), ("run", CONFIG, "dir=file/x")),
    Mistake("a broken run.json", broken_run, ("out/run.json is not what a run wrote there", "--fresh"), run()),
    Mistake("a schema below a file", write("file", ""), ("error: file",), ("schema", "--output", "file/schema.json")),
    Mistake("a plugin below a file", write("file", ""), ("file",), ("new", "plugin", "acme-tone", "--dir", "file/x")),
    Mistake("a file in a stage's place", file_for_stage, ("error: out/sft: File exists",), run()),
    Mistake("no run to report", nothing, ("smoke",), ("report", "smoke")),
    Mistake("no such stage to preview", nothing, ("sfd",), ("data", "preview", CONFIG, "sfd")),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(ROOT / "configs" / CONFIG, tmp_path)
    shutil.copytree(ROOT / "configs" / "smoke", tmp_path / "smoke")
    monkeypatch.chdir(tmp_path)
    # A model that is not here is not looked for elsewhere.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def told(*command: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, command, prog_name="alignkit")
    return result.exit_code, result.output


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_told(mistake: Mistake, folder: Path) -> None:
    mistake.make(folder)
    code, output = told(*mistake.command)
    assert "Traceback" not in output, output
    for part in mistake.says:
        assert part in output, output
    assert code == mistake.code


def test_a_reward_function_that_cannot_be_imported(folder: Path) -> None:
    """Found when its stage begins: the stages before it are kept to few steps."""
    edit("{kind: reward_model, stage: reward}", "{kind: python, function: 'no_such_module:f'}")(folder)
    code, output = told(*run("sft.optimizer.epochs=1", "reward.optimizer.epochs=1"))
    assert "reward function no_such_module:f: cannot import 'no_such_module'" in output
    assert ("Traceback" in output, code) == (False, 2)


def test_a_folder_that_may_not_be_written(folder: Path) -> None:
    (folder / "locked").mkdir(mode=0o500)
    # Root may write anywhere but where the kernel keeps no files.
    where, why = ("locked/out", "Permission denied") if os.geteuid() else ("/proc/out", "No such file or directory")
    code, output = told("run", CONFIG, f"dir={where}")
    assert f"the run's folder {where} cannot be written: {why}" in output
    assert ("Traceback" in output, code) == (False, 2)
