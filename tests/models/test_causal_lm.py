from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit.data.collate import collate
from alignkit.models.causal_lm import CausalPolicy, load
from alignkit.models.config import TuningConfig
from alignkit.models.scalar import load_scalar
from alignkit.types import TokenRow
from tests.fakes import ARCHITECTURES, tiny_folder, tiny_policy

LORA = TuningConfig(kind="lora", rank=4)


def rows() -> list[TokenRow]:
    made = []
    for i, (prompt, response) in enumerate([(3, 5), (7, 2), (1, 9)]):
        ids = tuple(4 + (17 * i + 5 * j) % 250 for j in range(prompt + response))
        made.append(TokenRow(str(i), ids, (False,) * prompt + (True,) * response))
    return made


def shaken(policy: CausalPolicy) -> CausalPolicy:
    """The policy after its trainable weights moved."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in policy.module.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    policy.version += 1
    return policy


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tuning", [TuningConfig(), LORA], ids=["full", "lora"])
def test_a_saved_policy_is_a_plain_transformers_folder_with_the_same_logits(
    architecture: str, tuning: TuningConfig, tmp_path: Path
) -> None:
    policy = shaken(tiny_policy(architecture, tuning=tuning))
    policy.save(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.tensor([rows()[0].ids])
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, policy.module(ids).logits, atol=1e-5)
    assert not list(tmp_path.glob("*.bin"))
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == policy.codec.tokenizer.chat_template
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file() == (tuning.kind == "lora")


def test_lora_trains_adapters_only_and_only_where_it_is_told() -> None:
    policy = tiny_policy(tuning=TuningConfig(kind="lora", rank=4, top_layers=1))
    trained = [name for name, weight in policy.module.named_parameters() if weight.requires_grad]
    assert trained
    assert all("lora_" in name and ".1." in name for name in trained)
    assert not any(weight.requires_grad for weight in tiny_policy(trainable=False).module.parameters())


def test_bfloat16_scores_are_close_and_rollouts_say_that_they_are_not_exact() -> None:
    exact, half = tiny_policy(), tiny_policy(precision="bfloat16")
    batch = collate(rows())
    difference = (exact.score_tokens(batch).logprobs - half.score_tokens(batch).logprobs).abs()[batch.loss_mask]
    assert 0 < float(difference.mean()) < 2e-2
    assert half.score_tokens(batch).logprobs.dtype == torch.float32
    assert exact.exact
    assert not half.exact


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_reward_is_read_at_the_last_real_token_and_survives_save_and_load(architecture: str, tmp_path: Path) -> None:
    folder = tiny_folder(architecture)
    model = load_scalar(folder, tuning=LORA, precision="float32", trainable=True, seed=1)
    model.offset, model.gain = 0.3, 2.0
    scores = model.scores(collate(rows()))
    for i, row in enumerate(rows()):
        hidden = model.backbone(torch.tensor([row.ids])).last_hidden_state[0, -1]
        assert abs(float(scores[i]) - 2.0 * (float(model.head(hidden)) - 0.3)) < 1e-5
    model.save(tmp_path)
    again = load_scalar(tmp_path, tuning=LORA, precision="float32", trainable=False, seed=9)
    assert torch.allclose(again.scores(collate(rows())), scores, atol=1e-5)
    assert not any(weight.requires_grad for weight in again.parameters())


def test_a_value_stands_at_the_token_that_it_comes_before() -> None:
    model = load_scalar(tiny_folder(), tuning=TuningConfig(), precision="float32", trainable=True, seed=1)
    row = rows()[0]
    values, raw = model.values(collate([row])), model(collate([row]))
    assert torch.equal(values[0, 1:], raw[0, :-1])


def test_a_saved_policy_stops_in_transformers_where_it_was_taught_to_stop(tmp_path: Path) -> None:
    policy = tiny_policy()
    policy.codec.stop_ids = (3, 1)
    policy.save(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == [3, 1]


def test_dropout_is_off_even_where_the_architecture_has_it(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("gpt2"))
    model.config.resid_pdrop = model.config.attn_pdrop = model.config.embd_pdrop = 0.5
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_folder("gpt2")).save_pretrained(tmp_path)
    policy = load(tmp_path, tuning=TuningConfig(), precision="float32", trainable=True, seed=0)
    batch = collate(rows())
    assert torch.equal(policy.score_tokens(batch).logprobs, policy.score_tokens(batch).logprobs)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_checkpointed_activations_are_computed_again_and_change_nothing(architecture: str, kind: Any) -> None:
    batch = collate(rows())
    gradients, forwards = [], []
    for checkpointing in (False, True):
        policy = shaken(tiny_policy(architecture, tuning=TuningConfig(kind=kind, rank=2, activation_checkpointing=checkpointing)))
        inner = [part for name, part in policy.module.named_modules() if name.endswith(("mlp.up_proj", "mlp.c_fc"))][-1]
        seen: list[None] = []
        inner.register_forward_hook(lambda *_, seen=seen: seen.append(None))
        policy.score_tokens(batch).logprobs.sum().backward()
        gradients.append([weight.grad for weight in policy.module.parameters() if weight.grad is not None])
        forwards.append(len(seen))
    assert forwards == [1, 2]
    assert gradients[0]
    for kept, again in zip(*gradients, strict=True):
        assert torch.equal(kept, again)
