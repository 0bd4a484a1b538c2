import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from alignkit.data.sources import FileConfig
from alignkit.errors import ModelError, RunError
from alignkit.interfaces import TokenBatch
from alignkit.models.config import TinyLMConfig, TuningConfig
from alignkit.settings import Component
from alignkit.testing import make_context
from alignkit.types import Demonstration, Message, Prompt, TokenRow
from alignkit_sft import PretrainConfig, SFTConfig, plan
from alignkit_sft.update import SFT

TINY = TinyLMConfig(hidden_size=64, layers=2, heads=4, positions=128)
CONFIG = SFTConfig(batch=4, learning_rate=3e-3, decay="constant")
PAIRS = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier"}

LONG = Demonstration(
    Prompt("long", (Message("user", "count"),)), (Message("assistant", "eins zwei drei vier fuenf sechs sieben acht neun zehn elf zwoelf"),)
)
Architecture = Literal["llama", "gpt2", "qwen2"]


def pretraining(folder: Path, fraction: float) -> PretrainConfig:
    """Six short texts, mixed in at a share."""
    file = folder / "text.jsonl"
    file.write_text("".join(json.dumps({"text": f"plain text {i}"}) + "\n" for i in range(6)), encoding="utf-8")
    return PretrainConfig(data=Component("jsonl", FileConfig(path=str(file))), fraction=fraction)


def make(folder: Path, config: SFTConfig = CONFIG) -> SFT:
    return SFT(config, make_context(folder, plan=plan(config, 400), policy=TINY))


def rows(sft: SFT) -> list[TokenRow]:
    demonstrations = [
        Demonstration(Prompt(word, (Message("user", word),)), (Message("assistant", answer),)) for word, answer in PAIRS.items()
    ]
    return [sft._policy.codec.demonstration(demonstration) for demonstration in demonstrations]


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


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("tokens", [1, 60, 4096])
def test_packing_changes_neither_the_loss_nor_the_gradient(tmp_path: Path, architecture: Architecture, tokens: int) -> None:
    """I-SFT-2, as the optimizer uses it."""
    tiny = replace(TINY, architecture=architecture)
    plain = SFT(CONFIG, make_context(tmp_path, plan=plan(CONFIG, 400), policy=tiny))
    config = replace(CONFIG, packing=True, microbatch_tokens=tokens)
    packed = SFT(config, make_context(tmp_path, plan=plan(config, 400), policy=tiny))
    batch = [*rows(plain), plain._policy.codec.demonstration(LONG)]
    first, second = plain.update(batch), packed.update(batch)
    assert second["data/trained_tokens"] == first["data/trained_tokens"]
    for name in ("loss/nll_nats", "optimizer/grad_norm"):
        assert second[name] == pytest.approx(first[name], rel=1e-5), name
    assert packed.validate(batch)["loss/nll_nats"] == pytest.approx(plain.validate(batch)["loss/nll_nats"], rel=1e-4)


@pytest.mark.parametrize("packing", [False, True])
def test_frozen_layers_are_computed_once_for_all_epochs_and_change_nothing_but_the_time(tmp_path: Path, packing: bool) -> None:
    policy, batch = replace(TINY, tuning=TuningConfig(kind="lora", rank=4, top_layers=1)), rows(make(tmp_path))
    said, seen, losses = list[str](), list[TokenBatch](), list[list[float]]()
    for epochs in (1, 3):
        config = replace(CONFIG, epochs=epochs, packing=packing)
        sft = SFT(config, replace(make_context(tmp_path, plan=plan(config, 4), rows=batch, policy=policy), say=said.append))
        plainly = sft._policy.score_tokens
        sft._policy.score_tokens = lambda part, plainly=plainly, **options: (seen.append(part), plainly(part, **options))[1]
        losses.append([*(sft.update(batch)["loss/nll_nats"] for _ in range(3)), sft.validate(batch)["loss/nll_nats"]])
    once, again = losses
    assert again == pytest.approx(once, rel=1e-5)
    assert once[3] < once[0] - 0.05
    assert said == ["the lowest 1 layers are frozen: what they make of 4 rows is computed once"]  # not where there is one epoch
    of_a_step = [part for part in seen if part.mask.sum() == sum(map(len, batch))]
    assert [part.below is not None for part in of_a_step] == [False] * 4 + [True] * 4


def test_packing_needs_fewer_rows(tmp_path: Path) -> None:
    packed = make(tmp_path, replace(CONFIG, packing=True))
    batch = [*rows(packed), packed._policy.codec.demonstration(LONG)]
    (together,) = packed._microbatches(batch, packed._config.microbatch_tokens)
    assert together.ids.shape[0] < len(batch)
    assert int(together.mask.sum()) == sum(map(len, batch))


def test_a_model_that_lets_packed_documents_see_each_other_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = make(tmp_path, replace(CONFIG, packing=True))
    batch = rows(packed)
    plainly = packed._policy.score_tokens
    monkeypatch.setattr(packed._policy, "score_tokens", lambda part, **options: plainly(replace(part, positions=None), **options))
    with pytest.raises(RunError, match=r"does not keep the documents of a row apart; set packing: false"):
        packed.update(batch)


def test_dropout_where_the_architecture_has_it_and_only_while_training(tmp_path: Path) -> None:
    tiny = replace(TINY, architecture="gpt2")

    def made(config: SFTConfig, seed: int = 0) -> SFT:
        return SFT(config, make_context(tmp_path, plan=plan(config, 400), policy=tiny, seed=seed))

    dropping = replace(CONFIG, dropout=0.3)
    plain, dropped, again, other = made(CONFIG), made(dropping), made(dropping), made(dropping, seed=1)
    batch = rows(plain)
    held_out = plain.validate(batch)["loss/nll_nats"]
    assert dropped.validate(batch)["loss/nll_nats"] == held_out  # validation drops nothing
    losses = [sft.update(batch)["loss/nll_nats"] for sft in (plain, dropped, again, other)]
    assert losses[0] == pytest.approx(held_out, rel=1e-6)
    assert abs(losses[1] - losses[0]) > 1e-4
    assert losses[2] == losses[1]  # what is dropped follows from the seed
    assert losses[3] != losses[1]
    assert not any(part.training for part in dropped._dropouts)


def test_dropout_is_refused_where_the_architecture_has_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"LlamaForCausalLM has no residual dropout that could be switched on; set dropout: 0\.0"):
        make(tmp_path, replace(CONFIG, dropout=0.2))


def test_a_share_of_pretraining_text_is_mixed_in_over_the_steps(tmp_path: Path) -> None:
    sft = make(tmp_path, replace(CONFIG, pretrain=pretraining(tmp_path, fraction=0.2)))
    counts = [sft.update(rows(sft))["data/pretraining_rows"] for _ in range(6)]
    assert counts == [1.0] * 6  # a fifth of 5 rows is text
    rarely = make(tmp_path, replace(CONFIG, pretrain=pretraining(tmp_path, fraction=1 / 9)))
    assert [rarely.update(rows(rarely))["data/pretraining_rows"] for _ in range(6)] == [0.0, 1.0] * 3


def test_pretraining_text_is_trained_token_by_token_with_the_demonstrations(tmp_path: Path) -> None:
    sft = make(tmp_path, replace(CONFIG, pretrain=pretraining(tmp_path, fraction=0.2)))
    alone = make(tmp_path)
    batch = rows(sft)
    metrics = sft.update(batch)
    extra = sft._pretraining.stream._chunks  # all six texts are "plain text N": eleven tokens predicted
    assert metrics["data/trained_tokens"] == alone.update(batch)["data/trained_tokens"] + 11
    assert {sum(chunk.loss_mask) for chunk in extra} == {11}


def test_an_interrupted_sft_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    config = replace(CONFIG, dropout=0.2, packing=True, pretrain=pretraining(tmp_path, fraction=0.2))
    tiny = replace(TINY, architecture="gpt2")

    def made() -> SFT:
        return SFT(config, make_context(tmp_path, plan=plan(config, 400), policy=tiny))

    whole, first, second = made(), made(), made()
    batch = rows(whole)
    for _ in range(4):
        whole.update(batch)
    for _ in range(2):
        first.update(batch)
    second.load_state(first.state())
    for _ in range(2):
        second.update(batch)
    for name, tensor in whole.state().tensors.items():
        assert torch.equal(tensor, second.state().tensors[name]), name


def test_data_that_never_trains_the_end_of_a_turn_is_refused(tmp_path: Path) -> None:
    endless = [TokenRow("a", (70, 71, 72), (False, True, True))]
    with pytest.raises(RunError, match="no demonstration trains the token that ends a turn"):
        SFT(CONFIG, make_context(tmp_path, plan=plan(CONFIG, 400), policy=TINY, rows=endless))
