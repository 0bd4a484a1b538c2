"""A backbone with a scalar head: the reward model reads it at a response's last token, the critic before each token."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.data.codec import TemplateCodec
from alignkit.errors import ModelError
from alignkit.interfaces import TokenBatch
from alignkit.models import adapters
from alignkit.models.attention import hidden_states, prepare
from alignkit.models.causal_lm import autocast, load, pick_device, resolve_precision
from alignkit.models.config import Precision, TuningConfig
from alignkit.ops.losses import score_index


class ScalarModel(nn.Module):
    """``head(hidden)`` at every position. A reward model's score is ``(scalar - offset) * gain``, applied here and nowhere else."""

    def __init__(self, backbone: Any, codec: TemplateCodec, precision: Precision) -> None:
        super().__init__()
        width = backbone.config.hidden_size
        self.backbone = backbone
        self.head = nn.Linear(width, 1)
        self.codec = codec
        self.offset = 0.0
        self.gain = 1.0
        self._precision = resolve_precision(precision)
        # Stiennon 2020 and lm-human-preferences: N(0, 1/sqrt(d+1)), so that first scores are about as large as hidden states are.
        nn.init.normal_(self.head.weight, std=1.0 / math.sqrt(width + 1))
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: TokenBatch) -> Tensor:
        """Scalars [b t] float32 at every token; at padding, any."""
        with autocast(self._precision, self.head.weight.device):
            hidden, line = hidden_states(self.backbone, batch)
        scalars: Tensor = self.head(hidden.float()).squeeze(-1)
        return scalars.index_select(0, line.flatten()).view(line.shape)

    @property
    def exact(self) -> bool:
        """Whether the arithmetic is float32."""
        return self._precision == "float32"

    def scores(self, batch: TokenBatch) -> Tensor:
        """The reward [b] of each row: the scalar at its last real token, less ``offset``, times ``gain``."""
        at = score_index(batch.mask).to(self.head.weight.device)
        raw: Tensor = self(batch).gather(1, at[:, None]).squeeze(1)
        return (raw - self.offset) * self.gain

    def values(self, batch: TokenBatch) -> Tensor:
        """The critic's values [b t]: at each token, the scalar of the position before it, from which the token is predicted."""
        before = self(batch)[:, :-1]
        return torch.cat([torch.zeros_like(before[:, :1]), before], dim=1)

    def save(self, folder: Path) -> None:
        """Write the backbone as a plain transformers folder, head, offset and gain beside it."""
        from safetensors.torch import save_file
        from transformers import GenerationConfig

        folder.mkdir(parents=True, exist_ok=True)
        self.backbone.save_pretrained(folder, state_dict=adapters.merged_state(self.backbone))
        # A backbone generates nothing, so that transformers would not write down where a turn ends.
        GenerationConfig(eos_token_id=list(self.codec.stop_ids)).save_pretrained(folder)
        self.codec.tokenizer.save_pretrained(folder)
        save_file({"weight": self.head.weight.detach().cpu(), "bias": self.head.bias.detach().cpu()}, folder / "head.safetensors")
        facts = {"offset": self.offset, "gain": self.gain, "template_hash": self.codec.template_hash}
        (folder / "reward_model.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def load_scalar(folder: Path, *, tuning: TuningConfig, precision: Precision, trainable: bool, seed: int) -> ScalarModel:
    """The reward model saved in ``folder``, or, where that holds a policy, its backbone with a new head drawn from ``seed``."""
    facts_file = folder / "reward_model.json"
    if not facts_file.is_file():
        policy = load(folder, tuning=tuning, precision=precision, trainable=trainable, seed=seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = ScalarModel(policy.module.base_model, policy.codec, precision).to(policy.device)
        return model if trainable else model.requires_grad_(False)

    from safetensors.torch import load_file
    from transformers import AutoModel

    from alignkit.models.source import codec_of_folder

    facts = json.loads(facts_file.read_text(encoding="utf-8"))
    backbone = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).to(pick_device()).eval()
    prepare(backbone)
    codec = codec_of_folder(folder)
    if codec.template_hash != facts["template_hash"]:
        raise ModelError(f"{folder}: its chat template is not the one it was trained with, so its scores would mean something else")
    model = ScalarModel(backbone, codec, precision).to(pick_device())
    model.head.load_state_dict(load_file(folder / "head.safetensors"))
    model.offset, model.gain = facts["offset"], facts["gain"]
    if not trainable:
        return model.requires_grad_(False)
    adapters.tune(backbone, tuning, seed)
    return model
