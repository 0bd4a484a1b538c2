"""Tiny policies of three architectures with opinions.

A model as it is initialised finds all tokens about equally likely whatever came before, and a mistake in positions, padding or masks
hides below any tolerance. Here the context moves log-probabilities by about half a nat.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit.context import Context
from alignkit.interfaces import State
from alignkit.models.causal_lm import CausalPolicy, load
from alignkit.models.config import Precision, TinyLMConfig, TuningConfig
from alignkit.testing import make_context
from alignkit.types import Plan
from tests.fakes import scratch, tiny_folder

Architecture = Literal["llama", "gpt2", "qwen2"]


@torch.no_grad()
def shake(module: nn.Module, amount: float, seed: int = 3) -> None:
    """Add noise to every trainable weight."""
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        if weight.requires_grad:
            weight.add_(amount * torch.randn(weight.shape, generator=generator))


@functools.cache
def vivid_folder(architecture: Architecture) -> Path:
    """A transformers folder of the model, made once."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder(architecture))
    shake(model, 0.15)
    folder = scratch(f"vivid-{architecture}")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_folder(architecture)).save_pretrained(folder)
    return folder


def vivid_policy(
    architecture: Architecture, *, tuning: TuningConfig | None = None, precision: Precision = "float32", trainable: bool = True
) -> CausalPolicy:
    """A fresh policy."""
    return load(vivid_folder(architecture), tuning=tuning or TuningConfig(), precision=precision, trainable=trainable, seed=0)


def vivid_context(folder: Path, architecture: Architecture, plan: Plan, *, seed: int = 0, tuning: TuningConfig | None = None) -> Context:
    """A stage's surroundings in which every model is the one of ``architecture``."""
    model = TinyLMConfig(architecture=architecture, tuning=tuning or TuningConfig())
    if not (folder / "tiny_lm").is_dir():
        shutil.copytree(vivid_folder(architecture), folder / "tiny_lm")
    return make_context(folder, plan=plan, policy=model, seed=seed)


def first_gradient(state: State, learner: str = "", *, beta1: float = 0.9) -> dict[str, Tensor]:
    """The gradient, by weight, of the one step that ``state``'s learner took without clipping: AdamW's first moment is a share of it."""
    prefix = f"{learner}adam.exp_avg/"
    return {name.removeprefix(prefix): moment / (1 - beta1) for name, moment in state.tensors.items() if name.startswith(prefix)}


def gradient_of(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """The gradient of a loss, by weight."""
    weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def relative_distance(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """How far two gradients lie apart, as a share of the second one's length."""
    assert found.keys() == wanted.keys()
    apart, length = (sum(float((x**2).sum()) for x in xs) for xs in ([found[n] - wanted[n] for n in wanted], wanted.values()))
    assert length > 0.0
    return (apart / length) ** 0.5
