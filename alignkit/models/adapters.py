"""Low-rank adapters inside a transformers model: put in, switched off for the reference, merged for saving."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.models.config import TuningConfig


def tune(model: Any, tuning: TuningConfig, seed: int) -> None:
    """Make exactly the weights that ``tuning`` names trainable. Adapters start as the identity (B = 0), A follows from ``seed``."""
    if tuning.activation_checkpointing:
        _checkpoint(model)
    if tuning.kind == "full":
        model.requires_grad_(True)
        return
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    model.requires_grad_(False)
    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        lora_dropout=0.0,
        target_modules=_targets(model, tuning.top_layers),
        # GPT-2 keeps its weights transposed.
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in model.modules()),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


def _checkpoint(model: Any) -> None:
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for part in model.modules():
        if isinstance(part, GradientCheckpointingLayer):
            part.training = True  # where transformers looks; what is inside it stays in evaluation mode, without dropout


def _targets(model: Any, top_layers: int) -> list[str]:
    """Names of the linear layers inside the blocks: not the head, which is what hidden states are read with."""
    from transformers.pytorch_utils import Conv1D

    first = model.config.num_hidden_layers - top_layers if top_layers else 0
    names = [name for name, part in model.named_modules() if isinstance(part, nn.Linear | Conv1D)]
    return [name for name in names if (block := re.search(r"\.(\d+)\.", name)) and int(block[1]) >= first]


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, part) for name, part in model.named_modules() if isinstance(part, LoraLayer))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within, the model is exactly what it was before its adapters."""
    layers = [layer for _, layer in _layers(model)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain model that computes what ``model`` computes, adapters folded into their layers."""
    state = {name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    for name, layer in _layers(model):
        weight = f"{name}.weight"
        state[weight] = state[weight] + layer.get_delta_weight("default").to(state[weight].dtype)
    return state


def save_adapters(model: Any, folder: Path) -> None:
    """Write the adapters alone, in peft's own form, if there are any."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    if not any(True for _ in _layers(model)):
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config["default"]
    config.save_pretrained(folder)
    save_file({k: v.contiguous() for k, v in get_peft_model_state_dict(model).items()}, folder / "adapter_model.safetensors")
