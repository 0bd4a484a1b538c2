"""What a run writes down as it goes, and what the person watching sees of it."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console

from alignkit.errors import SaveError
from alignkit.testing.imports import assert_light
from alignkit.tracking import EventLog, MetricsFile, Terminal


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_step_is_a_line_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.log("ppo", 1, {"kl/sequence_nats": 0.5, "time/step_seconds": 2.0})
    file.log("ppo", 2, {"kl/sequence_nats": math.nan, "reward/score_mean": -math.inf, "data/rows": 3})
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "kl/sequence_nats": 0.5, "time/step_seconds": 2.0},
        {"step": 2, "kl/sequence_nats": None, "reward/score_mean": None, "data/rows": 3},
    ]


def test_a_resumed_stage_has_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in (1, 2, 3, 4):
        file.log("ppo", step, {"kl/sequence_nats": float(step)})
    with path.open("a") as handle:
        handle.write('{"step": 5, "kl/seq')
    file.cut(2)
    file.log("ppo", 3, {"kl/sequence_nats": 30.0})
    assert [(line["step"], line["kl/sequence_nats"]) for line in lines(path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", [b'{"step": 2', b"\x00" * 40, b'{"step": 1}'[:7], b'{"kl/sequence_nats": "\xc3', b"[2]", b"null"])
def test_a_line_that_a_kill_left_unfinished_is_dropped(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "a/b": 1.0}\n' + torn)
    MetricsFile(path).cut(9)
    assert lines(path) == [{"step": 1, "a/b": 1.0}]


def test_a_stage_that_starts_over_has_no_steps_and_one_that_never_ran_has_no_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).cut(0)
    assert not path.exists()
    MetricsFile(path).log("ppo", 1, {})
    MetricsFile(path).cut(0)
    assert path.read_text() == ""


def test_metrics_that_cannot_be_written_wait_and_are_asked_for_before_a_checkpoint(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "removed" / "metrics.jsonl")
    file.log("ppo", 1, {"kl/coef": 0.1})
    with pytest.raises(
        SaveError, match=r"metrics\.jsonl cannot be written: .*No such file or directory.*; what was saved before is intact"
    ):
        file.sync()
    (tmp_path / "removed").mkdir()
    file.log("ppo", 2, {"kl/coef": 0.2})
    file.sync()
    assert lines(tmp_path / "removed" / "metrics.jsonl") == [{"step": 1, "kl/coef": 0.1}, {"step": 2, "kl/coef": 0.2}]


def test_events_have_the_time_and_outlive_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    EventLog(path).append("stage started", stage="größe")
    with path.open("a") as handle:
        handle.write('{"time": "20')
    EventLog(path).append("failed", error="\ud800", loss=math.inf)
    first, second = lines(path)
    assert (first["event"], first["stage"]) == ("stage started", "größe")
    assert (second["event"], second["error"], second["loss"]) == ("failed", "\ud800", None)
    assert datetime.now(UTC) - datetime.fromisoformat(str(second["time"])) < timedelta(minutes=1)


HEADLINE = ("reward/score_mean", "kl/sequence_nats", "response/length_tokens", "reward/absent")
STEP = {"reward/score_mean": 0.4213, "kl/sequence_nats": 3.14159, "response/length_tokens": 17.0, "loss/policy": 0.1}


def test_without_a_terminal_there_are_about_ten_lines_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr("alignkit.tracking.time.monotonic", lambda: clock)
    output = io.StringIO()
    with Terminal(Console(file=output)).stage("ppo", 200, 100, headline=HEADLINE) as progress:
        for step in range(101, 201):
            clock += 0.5
            progress.advance(step, STEP)
    shown = output.getvalue().splitlines()
    assert shown[0] == "ppo  120/200  reward 0.421  kl 3.14  length 17  (0:40 left)"
    assert [line.split()[1] for line in shown] == ["120/200", "140/200", "160/200", "180/200", "200/200"]
    assert shown[-1].endswith("length 17")


def test_without_a_terminal_slow_steps_are_told_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr("alignkit.tracking.time.monotonic", lambda: clock)
    output = io.StringIO()
    with Terminal(Console(file=output)).stage("sft", 1000, 0, headline=()) as progress:
        for step in range(1, 11):
            clock += 4.0
            progress.advance(step, {})
    assert output.getvalue().splitlines() == ["sft  3/1000  (1:06:28 left)", "sft  6/1000  (1:06:16 left)", "sft  9/1000  (1:06:04 left)"]


def test_held_out_figures_are_told_whenever_there_are_any() -> None:
    output = io.StringIO()
    with Terminal(Console(file=output)).stage("reward", 1000, 0, headline=("loss/ranking_nats",)) as progress:
        progress.advance(1, {"loss/ranking_nats": 0.7, "validation/loss_ranking_nats": 0.65, "validation/reward_accuracy": 0.5})
        progress.advance(2, {"loss/ranking_nats": 0.7})
    assert output.getvalue() == "reward: held out after step 1: loss 0.65  accuracy 0.5\n"


def test_on_a_terminal_a_bar_shows_the_figures_and_lines_stand_above_it() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, force_interactive=True, width=120, color_system=None)
    terminal = Terminal(console)
    with terminal.stage("ppo", 4, 1, headline=HEADLINE) as progress:
        progress.advance(2, STEP)
        progress.say("a line from the stage")
        terminal.say("a line from elsewhere")
        progress.advance(4, {**STEP, "response/length_tokens": 12345.6})
    shown = output.getvalue()
    assert "a line from the stage\n" in shown
    assert "a line from elsewhere\n" in shown
    assert "4/4 reward 0.421  kl 3.14  length 12,346" in shown.splitlines()[-2]  # The last thing sent is the cursor.


def test_a_line_is_said_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    text = f"[bold]{'long ' * 60}:smile: [/nothing]"
    Terminal().say(text)
    assert capsys.readouterr().out == text + "\n"


QUIET = """
import logging, os, sys, warnings
os.environ["TRANSFORMERS_VERBOSITY"] = "critical"
from alignkit.tracking import quiet_libraries
{first}
quiet_libraries()
import datasets
import transformers
from transformers.utils import logging as transformers_logging

def warn(module):
    warnings.warn_explicit(f"noise of {{module}}", UserWarning, "x.py", 1, module=module)

for module in ("transformers.generation", "torch.nn", "torchly_unrelated", "mine"):
    warn(module)
for name in ("datasets.load", "huggingface_hub.file_download", "peft"):
    logging.getLogger(name).warning("chatter of %s", name)
    logging.getLogger(name).error("trouble of %s", name)
assert not transformers_logging.is_progress_bar_enabled()
assert datasets.are_progress_bars_disabled()
assert os.environ["TRANSFORMERS_VERBOSITY"] == "critical", "what the user has set stays"
assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
"""


@pytest.mark.parametrize("first", ["", "import datasets, transformers"], ids=["before", "after"])
def test_other_libraries_are_quiet_and_their_errors_are_not(first: str) -> None:
    done = subprocess.run([sys.executable, "-c", QUIET.format(first=first)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "noise of mine" in done.stderr
    assert "noise of torchly_unrelated" in done.stderr
    assert "noise of transformers" not in done.stderr
    assert "noise of torch.nn" not in done.stderr
    assert "trouble of datasets.load" in done.stderr
    assert "trouble of peft" in done.stderr
    assert "chatter" not in done.stderr


WORK = """
import sys
from pathlib import Path

from alignkit.tracking import quiet_libraries

quiet_libraries()
import gguf
import numpy
from transformers import AutoModelForCausalLM

from alignkit.models import tiny
from alignkit.models.causal_lm import load
from alignkit.models.config import TinyLMConfig, TuningConfig

here = Path(sys.argv[1])
tiny.prepare(TinyLMConfig(architecture="gpt2"), here / "model")
policy = load(here / "model", tuning=TuningConfig(kind="lora"), precision="float32", trainable=True, seed=0)
policy.save(here / "policy")
AutoModelForCausalLM.from_pretrained(here / "policy").save_pretrained(here / "in_shards", max_shard_size="100KB")

writer = gguf.GGUFWriter(here / "model.gguf", "llama")
writer.add_context_length(32)
writer.add_embedding_length(8)
writer.add_block_count(0)
writer.add_feed_forward_length(16)
writer.add_head_count(2)
writer.add_head_count_kv(2)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_vocab_size(16)
for name, shape in {"token_embd.weight": (16, 8), "output_norm.weight": (8,), "output.weight": (16, 8)}.items():
    writer.add_tensor(name, numpy.ones(shape, dtype=numpy.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
assert AutoModelForCausalLM.from_pretrained(here, gguf_file="model.gguf").lm_head.weight.sum() == 128
"""


def test_saving_and_loading_models_is_silent(tmp_path: Path) -> None:
    """Shards, weights, GGUF and adapters of GPT-2 would each have a bar or a warning."""
    quiet = {name: value for name, value in os.environ.items() if "PROGRESS_BARS" not in name and name != "TQDM_DISABLE"}
    done = subprocess.run([sys.executable, "-c", WORK, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False, env=quiet)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


def test_tracking_is_light() -> None:
    assert_light(["alignkit.tracking", "alignkit.files", "alignkit.checkpoint"])
