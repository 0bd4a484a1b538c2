"""Trains a few steps with TRL on exports, as they are: python ... MODEL COMPARISONS LABELS DEMONSTRATIONS FOLDER"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

MODEL, COMPARISONS, LABELS, DEMONSTRATIONS, FOLDER = sys.argv[1:]
STEPS = 3


def rows(path: str) -> Any:
    return load_dataset("parquet", data_files=path, split="train", cache_dir=str(Path(FOLDER) / "cache"))


def options(**more: Any) -> dict[str, Any]:
    common = {"max_steps": STEPS, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    return {"output_dir": str(Path(FOLDER) / "out"), "use_cpu": True, "bf16": False, "max_length": 256, **common, **more}


def trained(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert len(logged) == STEPS, logged
    assert all(math.isfinite(line["loss"]) for line in logged), logged
    return logged


tokenizer = AutoTokenizer.from_pretrained(MODEL)

scalar = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=1)
reward = RewardTrainer(model=scalar, args=RewardConfig(**options()), train_dataset=rows(COMPARISONS), processing_class=tokenizer)
collated = next(iter(reward.get_train_dataloader()))
assert sorted(set(collated["margin"].tolist())) == [2.0], collated["margin"]
print("reward", trained(reward)[-1])

labels = rows(LABELS)
assert set(labels["label"]) == {True, False}
kto = KTOTrainer(
    model=AutoModelForCausalLM.from_pretrained(MODEL),
    ref_model=AutoModelForCausalLM.from_pretrained(MODEL),
    args=KTOConfig(**options()),
    train_dataset=labels,
    processing_class=tokenizer,
)
print("kto", trained(kto)[-1])

sft = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(MODEL),
    args=SFTConfig(**options()),
    train_dataset=rows(DEMONSTRATIONS),
    processing_class=tokenizer,
)
print("sft", trained(sft)[-1])
print("all three train on exports")
