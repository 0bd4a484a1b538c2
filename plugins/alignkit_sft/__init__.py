"""Supervised fine-tuning: the declaration. The work is in ``update.py``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from alignkit.adamw import AdamWConfig
from alignkit.api import Component, Context, DataSource, OfflineOptimizer, OptimizerSpec, Plan, TokenRow, hookimpl, setting


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pretraining text mixed into every step, as the policy that InstructGPT starts PPO from had it (Ouyang et al. 2022, appendix C.3)."""

    data: Component[DataSource] = setting(doc="rows with a `text`")
    fraction: float = setting(0.1, "share of a step's rows that are pretraining text", above=0.0, below=1.0)
    max_length: int = setting(512, "tokens of a chunk; longer texts become several", at_least=2)


@dataclass(frozen=True, kw_only=True)
class SFTConfig(AdamWConfig):
    """Maximum likelihood of demonstrations (Ouyang et al. 2022, section 3.5)."""

    learning_rate: float = setting(2e-5, "peak learning rate", above=0.0)
    epochs: int = setting(1, "passes over the demonstrations", at_least=1)
    batch: int = setting(16, "demonstrations per step", at_least=1)
    packing: bool = setting(False, "put several demonstrations into one row, kept apart; changes time, not results")
    dropout: float = setting(0.0, "residual dropout in training (InstructGPT: 0.2), where the architecture has it", at_least=0.0, below=1.0)
    pretrain: PretrainConfig | None = setting(None, "pretraining text beside the demonstrations")


def plan(config: SFTConfig, rows: int) -> Plan:
    """Whole passes over the data; the last step of the last pass runs over into the next permutation."""
    return Plan(steps=math.ceil(config.epochs * rows / config.batch), rows=min(config.batch, rows))


def build(config: SFTConfig, context: Context) -> OfflineOptimizer[list[TokenRow]]:
    """The optimizer for the policy that the stage starts from."""
    from alignkit_sft.update import SFT

    return SFT(config, context)


@hookimpl
def register_optimizers() -> list[OptimizerSpec]:
    """Declare ``sft``."""
    return [
        OptimizerSpec(
            kind="sft", summary="supervised fine-tuning on demonstrations", config=SFTConfig, feed="demonstrations", plan=plan, build=build
        )
    ]
