from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alignkit.models.config import TinyLMConfig
from alignkit.rollout import LocalEngine
from alignkit.testing import make_context
from alignkit.types import Demonstration, Message, Prompt, PromptRow, Sampling, TokenRow
from alignkit_sft import SFTConfig, plan
from alignkit_sft.update import SFT

TINY = TinyLMConfig(hidden_size=64, layers=2, heads=4, positions=128)
CONFIG = SFTConfig(batch=4, learning_rate=3e-3, decay="constant")
PAIRS = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier"}


def make(folder: Path, config: SFTConfig = CONFIG) -> SFT:
    return SFT(config, make_context(folder, plan=plan(config, 400), policy=TINY))


def rows(sft: SFT) -> list[TokenRow]:
    demonstrations = [
        Demonstration(Prompt(word, (Message("user", word),)), (Message("assistant", answer),)) for word, answer in PAIRS.items()
    ]
    return [sft._policy.codec.demonstration(demonstration) for demonstration in demonstrations]


def test_four_examples_are_learnt_by_heart_and_the_answers_stop(tmp_path: Path) -> None:
    """I-SFT-5."""
    sft = make(tmp_path)
    batch = rows(sft)
    for _ in range(120):
        metrics = sft.update(batch)
    assert metrics["loss/nll_nats"] < 0.05
    prompts = [Prompt(word, (Message("user", word),)) for word in PAIRS]
    asked = [PromptRow(prompt, sft._policy.codec.prompt(prompt)) for prompt in prompts]
    rollout = LocalEngine(0).rollout(sft._policy, asked, Sampling(12, temperature=1e-4), samples_per_prompt=1, step=0)
    assert [sample.response for sample in rollout.samples] == list(PAIRS.values())
    assert all(sample.finished for sample in rollout.samples)


@pytest.mark.parametrize("tokens", [1, 60, 100])
def test_the_loss_is_per_token_of_the_whole_step_however_it_is_split(tmp_path: Path, tokens: int) -> None:
    """I-SFT-1, with ragged rows."""
    whole, split = make(tmp_path), make(tmp_path, replace(CONFIG, microbatch_tokens=tokens))
    batch = rows(whole)
    first, second = whole.update(batch), split.update(batch)
    for name, value in first.items():
        assert second[name] == pytest.approx(value, rel=1e-5), name


def test_only_what_is_marked_is_counted_and_trained(tmp_path: Path) -> None:
    sft = make(tmp_path)
    batch = rows(sft)
    assert sft.update(batch)["data/trained_tokens"] == sum(len(answer) + 1 for answer in PAIRS.values())  # bytes and end of turn
    first = TokenRow("all", batch[0].ids, (True,) * len(batch[0]))
    assert sft.update([first])["data/trained_tokens"] == len(batch[0]) - 1  # nothing predicts the first token


def test_validation_is_the_mean_over_all_tokens(tmp_path: Path) -> None:
    sft = make(tmp_path)
    batch = rows(sft)
    losses = [(sft.validate([row])["loss/nll_nats"], sum(row.loss_mask)) for row in batch]
    mean = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    assert sft.validate(batch)["loss/nll_nats"] == pytest.approx(mean, rel=1e-5)


def test_the_policys_version_counts_updates(tmp_path: Path) -> None:
    sft = make(tmp_path)
    before = [weight.clone() for weight in sft._policy.module.parameters()]
    sft.update(rows(sft))
    assert sft._policy.version == 1
    assert any(not torch.equal(a, b) for a, b in zip(before, sft._policy.module.parameters(), strict=True))
