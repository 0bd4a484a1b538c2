"""Forwards for generation: without gradients, with weights that were cast and repacked once, for tokens in line.

Any architecture runs through its own transformers forward. The Llama family, to which most small models belong, has one of its own here:
a decoding step has so little to compute that calling it is a large part of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM
from transformers.pytorch_utils import Conv1D

from alignkit.models.attention import Attention, run
from alignkit.models.between import between_products, normed
from alignkit.models.kernels import Product, product


class Decoding(Protocol):
    """A model to generate with. ``recordable``: whether its forward is calls of the device alone, so that a graph can be made of it."""

    layers: int
    device: torch.device
    recordable: bool

    def hidden(self, ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Last hidden states [n d] of tokens in line, ``ids`` and ``positions`` [n]."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n v] of the tokens that follow."""


@contextmanager
def decoding(model: Any, weights: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[Decoding]:
    """Within, generation with ``weights`` (a state dict of the plain model, adapters merged), products in ``dtype``."""
    if type(model) in (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM) and model.config.hidden_act == "silu":
        yield LlamaDecoding(model, weights, dtype)
    else:
        with _prepared_layers(model, weights, dtype):
            yield AnyDecoding(model)


class AnyDecoding:
    """Through the forward of transformers, of which nothing is known: that of some position embeddings looks at its numbers."""

    recordable = False

    def __init__(self, model: Any) -> None:
        self._model = model
        self.layers: int = model.config.num_hidden_layers
        self.device: torch.device = next(model.parameters()).device

    def hidden(self, ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Last hidden states [n d]."""
        return run(self._model, ids, positions, attention)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n v]."""
        logits: Tensor = self._model.get_output_embeddings()(hidden)
        return logits


@contextmanager
def _prepared_layers(model: nn.Module, weights: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[None]:
    """Within, the linear layers of ``model`` compute with prepared ``weights``; other layers are left as they are."""
    changed = []
    try:
        for name, part in model.named_modules():
            base = getattr(part, "base_layer", part)  # peft puts the layer that it adapts there
            if isinstance(base, nn.Linear | Conv1D) and not name.endswith(".base_layer") and ".lora_" not in name:
                weight, of_gpt2 = weights[f"{name}.weight"], isinstance(base, Conv1D)
                # GPT-2 keeps its weights transposed.
                part.forward = product(weight.t() if of_gpt2 else weight, base.bias, dtype, installed=not of_gpt2)
                changed.append(part)
        yield
    finally:
        for part in changed:
            del part.forward


@dataclass(frozen=True, slots=True)
class _Layer:
    """``qkv``: the products of query, key and value at once; ``gate_up`` likewise."""

    qkv: Product
    out: Product
    before_mlp: Tensor
    gate_up: Product
    down: Product
    window: int | None


class LlamaDecoding:
    """Llama, Mistral and Qwen2 (Touvron et al. 2023): the same numbers as transformers' forward, in a third of the calls."""

    recordable = True

    def __init__(self, model: Any, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        config, base = model.config, model.model
        self.layers: int = config.num_hidden_layers
        self.device: torch.device = base.embed_tokens.weight.device
        self._heads, self._key_heads = config.num_attention_heads, config.num_key_value_heads
        self._scale: float = base.layers[0].self_attn.scaling
        self._rotary, self._epsilon = base.rotary_emb, config.rms_norm_eps
        self._embedding, self._dtype = base.embed_tokens.weight.detach(), dtype
        # The CPU attends in float32, in which these are cast once and not each by itself.
        self._attended = torch.float32 if self.device.type == "cpu" else dtype
        self._norms = [norm.weight.detach() for norm in (*(layer.input_layernorm for layer in base.layers), base.norm)]

        def joined(*names: str) -> Product:
            biases = [weights[f"{name}.bias"] for name in names if f"{name}.bias" in weights]
            return product(torch.cat([weights[f"{name}.weight"] for name in names]), torch.cat(biases) if biases else None, dtype)

        self._layers = []
        for i, layer in enumerate(base.layers):
            at = f"model.layers.{i}"
            self._layers.append(
                _Layer(
                    qkv=joined(*(f"{at}.self_attn.{name}_proj" for name in "qkv")),
                    out=joined(f"{at}.self_attn.o_proj"),
                    before_mlp=layer.post_attention_layernorm.weight.detach(),
                    gate_up=joined(f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"),
                    down=joined(f"{at}.mlp.down_proj"),
                    # Qwen2 has one a layer, Mistral one for all, Llama none.
                    window=getattr(layer.self_attn, "sliding_window", getattr(config, "sliding_window", None)),
                )
            )
        self._head = joined("lm_head")

    def hidden(self, ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Last hidden states [n d]."""
        x = self._embedding[ids]
        cos, sin = (angle[0, :, None] for angle in self._rotary(x[None], positions[None]))
        half = cos.shape[-1] // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        ops = between_products()
        seen = normed(x, self._norms[0], self._epsilon, self._dtype)
        for number, layer in enumerate(self._layers):
            query, key, value = ops.rotated(layer.qkv(seen), cos, sin, self._heads, self._key_heads, self._attended)
            gathered = attention.attend(number, query, key, value, self._scale, layer.window)
            x, seen = ops.added_normed(x, layer.out(gathered.flatten(1)), layer.before_mlp, self._epsilon, self._dtype)
            x, seen = ops.added_normed(x, layer.down(ops.gated(layer.gate_up(seen))), self._norms[number + 1], self._epsilon, self._dtype)
        return seen

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n v]."""
        return self._head(hidden)
