"""A random language model small enough for tests, in three architectures, with a byte-level tokenizer and a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.checkpoint import save_artifact
from alignkit.models.config import TinyLMConfig

if TYPE_CHECKING:
    from alignkit.data.codec import TemplateCodec

SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|im_start|>", "<|im_end|>")


def prepare(config: TinyLMConfig, folder: Path) -> Path:
    """Write the model that the config's seed makes."""
    save_artifact(folder, lambda target: _write(config, target))
    return folder


def _write(config: TinyLMConfig, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = AutoModelForCausalLM.from_config(model_config(config, len(tokenizer)))
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def byte_tokenizer() -> Any:
    """One token a byte, and four special tokens; the end-of-turn token ends every response."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from alignkit.data.codec import DEFAULT_CHAT_TEMPLATE

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|im_end|>", extra_special_tokens=["<|end|>", "<|im_start|>"]
    )
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    return tokenizer


def byte_codec() -> TemplateCodec:
    """The codec of every tiny model."""
    from alignkit.data.codec import TemplateCodec

    tokenizer = byte_tokenizer()
    return TemplateCodec(tokenizer, (tokenizer.eos_token_id,))


def model_config(config: TinyLMConfig, vocabulary: int) -> Any:
    """The transformers config of the architecture, without dropout."""
    from transformers import GPT2Config, LlamaConfig, Qwen2Config

    ids = {"pad_token_id": 0, "eos_token_id": 3, "bos_token_id": None, "vocab_size": vocabulary}
    if config.architecture == "gpt2":
        return GPT2Config(
            n_embd=config.hidden_size, n_layer=config.layers, n_head=config.heads, n_positions=config.positions,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **ids,
        )  # fmt: skip
    shape = {
        "hidden_size": config.hidden_size, "intermediate_size": 3 * config.hidden_size, "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads, "num_key_value_heads": max(1, config.heads // 2),
        "max_position_embeddings": config.positions, **ids,
    }  # fmt: skip
    return LlamaConfig(**shape) if config.architecture == "llama" else Qwen2Config(**shape, tie_word_embeddings=True)
