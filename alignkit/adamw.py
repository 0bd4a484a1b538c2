"""Settings of one learner: ``torch.optim.AdamW``, its learning-rate schedule, clipping, and how much is computed at once. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from alignkit.settings import setting


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """Config dataclasses of optimizers inherit from this, so that the keys are the same everywhere."""

    learning_rate: float = setting(1e-5, "peak learning rate", above=0.0)
    warmup: float = setting(0.0, "share of the steps over which the learning rate rises linearly to its peak", at_least=0.0, below=1.0)
    decay: Literal["constant", "linear", "cosine"] = setting("cosine", "how the learning rate falls after the warm-up")
    floor: float = setting(
        0.1, "share of the peak at which the warm-up starts and the decay ends (InstructGPT: 0.1)", at_least=0.0, at_most=1.0
    )
    beta1: float = setting(0.9, "AdamW's decay of the first moment", at_least=0.0, below=1.0)
    beta2: float = setting(0.95, "AdamW's decay of the second moment", at_least=0.0, below=1.0)
    epsilon: float = setting(1e-8, "AdamW's epsilon", above=0.0)
    weight_decay: float = setting(0.0, "AdamW's decoupled weight decay", at_least=0.0)
    clip_norm: float = setting(1.0, "gradients are scaled down to this global norm", above=0.0)
    microbatch_tokens: int = setting(
        4096, "most tokens, padding included, in one forward and backward; changes memory, not results", at_least=1
    )
