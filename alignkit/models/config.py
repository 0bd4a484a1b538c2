"""What a config says about a model. Torch-free: ``alignkit check`` reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from alignkit.settings import setting

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """Which weights are trained."""

    kind: Literal["full", "lora"] = setting("full", "full: every weight; lora: low-rank adapters on the linear layers (arXiv:2106.09685)")
    rank: int = setting(16, "rank of the adapters", at_least=1)
    alpha: float = setting(32.0, "the adapters' output is scaled by alpha / rank", above=0.0)
    top_layers: int = setting(0, "adapters on this many layers nearest the output only; 0: on all", at_least=0)
    activation_checkpointing: bool = setting(
        False, "compute each layer again in the backward pass instead of keeping what it needs: less memory, about a third more time"
    )


@dataclass(frozen=True, kw_only=True)
class CausalLMConfig:
    """A causal language model of the transformers library."""

    model: str = setting(doc="a folder, a hub id, a .gguf file, or package:NAME/PATH for a file inside an installed Python package")
    tuning: TuningConfig = setting(TuningConfig(), "which weights are trained")
    precision: Precision = setting("auto", "of the arithmetic; masters are always float32. auto: bfloat16 where it is found to be faster")
    chat_template: str | None = setting(None, "none: the tokenizer's own; default: alignkit's; else a file that holds a Jinja template")
    trust_remote_code: bool = setting(False, "run Python code that comes with the model")


@dataclass(frozen=True, kw_only=True)
class TinyLMConfig:
    """A small random model with a byte-level tokenizer, made on the spot from a seed: for tests, and to try things out."""

    architecture: Literal["llama", "gpt2", "qwen2"] = setting("llama", "whose shape it has")
    hidden_size: int = setting(64, "width", at_least=8)
    layers: int = setting(2, "depth", at_least=1)
    heads: int = setting(4, "attention heads", at_least=1)
    positions: int = setting(512, "longest sequence", at_least=8)
    seed: int = setting(0, "the weights follow from it", at_least=0)
    tuning: TuningConfig = setting(TuningConfig(), "which weights are trained")
    precision: Precision = setting("float32", "of the arithmetic")
