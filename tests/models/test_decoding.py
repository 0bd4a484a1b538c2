"""Forwards for generation give the logits of transformers' own."""

import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from alignkit.data.collate import collate
from alignkit.models import adapters, kernels
from alignkit.models.attention import lay_out, prepare
from alignkit.models.config import TuningConfig
from alignkit.models.decoding import AnyDecoding, Decoding, LlamaDecoding, decoding
from alignkit.rollout.decoder import Decoder, Request
from alignkit.types import TokenRow

SHAPE: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE)),
    "llama with biases": (LlamaForCausalLM, LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "llama with longer positions": (
        LlamaForCausalLM,
        LlamaConfig(**SHAPE, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}),
    ),
    "mistral": (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=4)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=8)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
}
OWN = {"llama", "llama with biases", "llama with longer positions", "mistral", "qwen2"}
TEXTS = [[5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 7], [5, 6, 7, 8, 20, 21], [30]]


def vivid(name: str) -> Any:
    """A model with opinions, biases that are not 0 and norms that are not 1."""
    torch.manual_seed(0)
    build, config = MODELS[name]
    model = build(copy.deepcopy(config)).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.add_(0.2 * torch.randn(weight.shape))
    return model


def next_logits(model: Any, text: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([text])).logits[0, -1]
    return logits


def line_logits(model: Decoding) -> list[Tensor]:
    batch = collate([TokenRow("", tuple(text), (True,) * len(text)) for text in TEXTS])
    layout = lay_out(batch)
    hidden = model.hidden(batch.ids.flatten()[layout.tokens], layout.positions, layout)
    return [model.logits(hidden)[layout.line[i, len(text) - 1]] for i, text in enumerate(TEXTS)]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = kernels.chosen()
    yield
    kernels.use(before)


@pytest.fixture
def decode(request: pytest.FixtureRequest) -> None:
    """A way of multiplying."""
    kernels.use(kernels.Kernels(decode=request.param))


@pytest.mark.usefixtures("decode")
@pytest.mark.parametrize("decode", ["torch", "transposed", "packed"], indirect=True)
@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_those_of_transformers(name: str) -> None:
    model = vivid(name)
    with torch.inference_mode():
        wanted = [next_logits(model, text) for text in TEXTS]
        prepare(model)
        with decoding(model, model.state_dict(), torch.float32) as found:
            assert isinstance(found, LlamaDecoding if name in OWN else AnyDecoding)
            for got, want in zip(line_logits(found), wanted, strict=True):
                assert torch.allclose(got, want, atol=1e-4)


@pytest.mark.usefixtures("decode")
@pytest.mark.parametrize("decode", ["torch", "transposed", "packed"], indirect=True)
@pytest.mark.parametrize("name", MODELS)
def test_greedy_decoding_says_what_the_plain_forward_says_token_by_token(name: str) -> None:
    model, plain = vivid(name), vivid(name)
    prepare(model)
    with decoding(model, model.state_dict(), torch.float32) as found:
        decoder = Decoder(found, max_rows=3)
        numbers = {decoder.add(Request(tuple(text), 9, 1e-4, (), i)): list(text) for i, text in enumerate(TEXTS)}
        while decoder.busy:
            for event in decoder.step():
                text = numbers[event.request]
                with torch.no_grad():
                    assert event.token == int(next_logits(plain, text).argmax())
                text.append(event.token)
    assert [len(text) for text in numbers.values()] == [len(text) + 9 for text in TEXTS]


def test_gpt2s_layers_are_sampled_from_as_they_are_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's products, where oneDNN's were chosen: ``Conv1D`` is none of the layers that train with those. Its head is."""
    monkeypatch.setattr(kernels, "_NARROW", 1)
    model = vivid("gpt2")
    for chosen, packed in ((kernels.Kernels(linear="onednn", decode="packed"), 1), (kernels.Kernels(decode="packed"), 9)):
        kernels.use(chosen)
        with mock.patch.object(kernels, "_packed", wraps=kernels._packed) as packing, decoding(model, model.state_dict(), torch.float32):
            assert packing.call_count == packed


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_are_merged_and_the_model_is_left_as_it_was(name: str) -> None:
    model = vivid(name)
    adapters.tune(model, TuningConfig(kind="lora", rank=2), seed=1)
    prepare(model)
    generator = torch.Generator().manual_seed(2)
    for weight_name, weight in model.named_parameters():
        if "lora_B" in weight_name:
            weight.data.add_(torch.randn(weight.shape, generator=generator))
    with torch.no_grad():
        wanted = [next_logits(model, text) for text in TEXTS]
        with decoding(model, adapters.merged_state(model), torch.float32) as found:
            for got, want in zip(line_logits(found), wanted, strict=True):
                assert torch.allclose(got, want, atol=1e-3)
        assert not any("forward" in vars(part) for part in model.modules())
        assert torch.equal(next_logits(model, TEXTS[0]), wanted[0])


def test_a_forward_that_fails_leaves_the_model_as_it_was() -> None:
    model: nn.Module = vivid("gpt2")
    prepare(model)
    with pytest.raises(RuntimeError, match="on purpose"), decoding(model, model.state_dict(), torch.bfloat16):
        raise RuntimeError("on purpose")
    assert not any("forward" in vars(part) for part in model.modules())
