"""Out of memory: the step is done again in smaller microbatches, and nothing of it is another's."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignkit import run
from alignkit.adamw import AdamWConfig
from alignkit.config.schema import GuardConfig
from alignkit.errors import RunError
from alignkit.guards.guard import Guard
from alignkit.guards.memory import is_out_of_memory
from alignkit.interfaces import Rollout
from alignkit.learner import Learner, Share
from alignkit.models.causal_lm import CausalPolicy
from alignkit.models.decoding import LlamaDecoding
from alignkit.rollout import LocalEngine
from alignkit.tracking import EventLog
from alignkit.types import Message, Metrics, Prompt, PromptRow, Sampling
from tests.fakes import tiny_policy

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs" / "smoke.yaml"
NOWHERE = 2**46  # bytes that no machine has


class Line(nn.Module):
    """y = w x, with a coin thrown for every x."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0]))

    def split(self, tokens: int, fitting: int, xs: list[float]) -> list[Share]:
        """A microbatch of more than ``fitting`` numbers asks for more memory than there is, after it has thrown its coins."""

        def loss(part: list[float]) -> tuple[Tensor, Metrics]:
            kept = torch.bernoulli(torch.full((len(part),), 0.5))
            share = (kept * (self.w * torch.tensor(part) - 1.0) ** 2).sum() / len(xs)
            if len(part) > fitting:
                torch.empty(NOWHERE, dtype=torch.uint8)
            return share, {"loss/kept": float(kept.sum())}

        return [partial(loss, xs[i : i + tokens]) for i in range(0, len(xs), tokens)]


def test_the_same_coins_are_thrown_again_and_the_small_microbatch_is_remembered(tmp_path: Path) -> None:
    said: list[str] = []
    guard = Guard("sft", GuardConfig(), "", said.append, EventLog(tmp_path / "events.jsonl"))
    xs = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    line, plain = Line(), Line()
    learner = Learner(line, AdamWConfig(learning_rate=0.1, microbatch_tokens=64), steps=4, guard=guard)
    torch.manual_seed(1)
    found = learner.step(lambda tokens: line.split(tokens, 2, xs))
    after = torch.get_rng_state()
    torch.manual_seed(1)
    wanted = Learner(plain, AdamWConfig(learning_rate=0.1, microbatch_tokens=2), steps=4).step(lambda tokens: plain.split(tokens, 2, xs))
    assert found == wanted
    assert torch.equal(line.w, plain.w)
    assert torch.equal(after, torch.get_rng_state())
    # 64, 32, 16 and 8 are one microbatch of eight: only what splits it is tried.
    text = "sft: out of memory: microbatches have {} tokens from here on, not {}; the batch is the same"
    assert said == [text.format(4, 64), text.format(2, 4)]
    assert learner.state().values["microbatch_tokens"] == 2

    again = Line()
    restored = Learner(again, AdamWConfig(learning_rate=0.1, microbatch_tokens=64), steps=4, guard=guard)
    restored.load_state(learner.state())
    restored.step(lambda tokens: again.split(tokens, 2, xs))
    assert len(said) == 2  # it did not have to be found out again


def test_a_single_row_that_does_not_fit_is_an_error_that_says_what_to_do() -> None:
    line = Line()
    learner = Learner(line, AdamWConfig(microbatch_tokens=4), steps=4)
    with pytest.raises(RunError, match=r"out of memory at step 1, with a single row in a microbatch; shorten the rows"):
        learner.step(lambda tokens: line.split(tokens, 0, [1.0, 2.0, 3.0, 4.0]))
    assert line.w.item() == 1.0
    assert line.w.grad is None


def decoder_with_room_for(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of more rows than that ask for more memory than there is."""
    plenty = LlamaDecoding.logits

    def logits(model: LlamaDecoding, hidden: Tensor) -> Tensor:
        if len(hidden) > rows:
            torch.empty(NOWHERE, dtype=torch.uint8)
        return plenty(model, hidden)

    monkeypatch.setattr(LlamaDecoding, "logits", logits)


def rollout_of_twelve(engine: LocalEngine, policy: CausalPolicy) -> Rollout:
    prompts = [Prompt(str(i), (Message("user", "x" * i),)) for i in range(1, 7)]
    rows = [PromptRow(prompt, policy.codec.prompt(prompt)) for prompt in prompts]
    return engine.rollout(policy, rows, Sampling(9), samples_per_prompt=2, step=3)


def test_a_rollout_that_does_not_fit_is_drawn_again_a_few_rows_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    guard = Guard("ppo", GuardConfig(), "", said.append, EventLog(tmp_path / "events.jsonl"))
    policy = tiny_policy()
    plenty = rollout_of_twelve(LocalEngine(0), policy)
    decoder_with_room_for(4, monkeypatch)
    engine = LocalEngine(0, guard)
    for _ in range(2):  # the second time it need not be found out again
        limited = rollout_of_twelve(engine, policy)
        assert limited.samples == plenty.samples
        assert torch.equal(limited.batch.ids, plenty.batch.ids)
        assert torch.allclose(limited.logprobs, plenty.logprobs, atol=1e-5)
    text = "ppo: out of memory: at most {} responses are drawn at once from here on, not {}; the batch is the same"
    assert said == [text.format(6, 12), text.format(3, 6)]


def test_a_single_response_that_does_not_fit_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder_with_room_for(0, monkeypatch)
    with pytest.raises(RunError, match=r"out of memory while a single response was drawn; shorten it \(max_length, max_new_tokens\)"):
        rollout_of_twelve(LocalEngine(0), tiny_policy())


def test_whatever_else_does_not_fit_ends_the_stage_with_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the models alone are too large. The same command goes on once there is memory."""
    asked = [f"dir={tmp_path / 'run'}"]
    monkeypatch.setattr("alignkit.models.adapters.tune", lambda *_: torch.empty(NOWHERE, dtype=torch.uint8))
    with pytest.raises(RunError, match=r"^stage sft: out of memory, .* What was said: .*allocate") as failed:
        run(SMOKE, asked)
    monkeypatch.undo()
    assert "\n" not in str(failed.value)
    run(SMOKE, asked)
    assert (tmp_path / "run" / "ppo" / "manifest.json").is_file()


def test_another_error_is_not_taken_for_it() -> None:
    line = Line()
    learner = Learner(line, AdamWConfig(), steps=4)

    def broken() -> tuple[Tensor, Metrics]:
        return (torch.ones(2) @ torch.ones(3)) * line.w, {}

    with pytest.raises(RuntimeError, match="size"):
        learner.step(lambda tokens: [broken])


@pytest.mark.parametrize("sentence", ["std::bad_alloc", "could not create a primitive", "DefaultCPUAllocator: can't allocate memory"])
def test_whatever_library_says_it_memory_is_what_is_missing(sentence: str) -> None:
    assert is_out_of_memory(RuntimeError(sentence))


def test_with_a_real_limit_loss_and_gradient_are_those_without_it(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.guards.limited", str(tmp_path), "40"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    limited, plenty = report["limited"], report["plenty"]
    assert plenty["tokens"] == 100_000
    assert limited["tokens"] < report["row_tokens"]  # all rows at once did not fit
    assert limited["loss"] == pytest.approx(plenty["loss"], abs=1e-6)
    assert limited["norm"] == pytest.approx(plenty["norm"], abs=1e-6)
    assert report["gradients_apart"] < 1e-6
    # With dropout it is, to the bit, the step of a run that began with microbatches of that size.
    assert report["dropped_tokens"] < report["row_tokens"]
    assert report["dropped_alike"]
