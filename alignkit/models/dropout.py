"""Residual dropout for supervised fine-tuning. Everywhere else dropout is off: with it the ratio of PPO would not be 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from alignkit.errors import ModelError

_NAMES = (".resid_dropout", ".mlp.dropout", ".post_attention_dropout", ".post_mlp_dropout")
"""What transformers calls the dropout on what a block adds to its residual stream: GPT-2, GPT-J, CodeGen and Phi; GPT-NeoX."""


def residual_dropouts(module: nn.Module) -> list[nn.Dropout]:
    """The residual dropouts of a transformers model. Raises ``ModelError`` for an architecture that has none, such as Llama."""
    found = [part for name, part in module.named_modules() if isinstance(part, nn.Dropout) and name.endswith(_NAMES)]
    if not found:
        raise ModelError(
            f"dropout is asked for, and {type(module).__name__} has no residual dropout that could be switched on; "
            "set dropout: 0.0, or choose an architecture that has it (GPT-2, GPT-NeoX, Phi)"
        )
    return found


@contextmanager
def dropping(parts: list[nn.Dropout], share: float, seed: int) -> Iterator[None]:
    """Within, ``parts`` drop ``share`` of what passes, and what they drop follows from ``seed``."""
    before = [(part.p, part.training) for part in parts]
    for part in parts:
        part.p = share
        part.train()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        for part, (p, training) in zip(parts, before, strict=True):
            part.p = p
            part.train(training)
