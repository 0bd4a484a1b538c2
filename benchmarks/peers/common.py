"""What the peers' scripts share: the quiet surroundings that they need, and a gate in place of a step's beginning and end."""

from __future__ import annotations

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1", "WANDB_DISABLED": "true"}

import tempfile
import warnings
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from benchmarks.bench_pipe import CLOCKS, Gate, settings
from benchmarks.bench_work import Work

FOREVER = 100_000
"""Steps that a trainer is told to do; the benchmark stops long before."""


class Told:
    """The parent's settings, read once."""

    def __init__(self) -> None:
        warnings.filterwarnings("ignore")
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.options = settings()
        self.work = Work(**self.options["work"])
        self.clock = CLOCKS[self.options["clock"]]
        self.gate = Gate()
        self.gate.facts = {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
        torch.set_num_threads(self.options["threads"])
        torch.manual_seed(self.work.seed)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        dtype: torch.dtype = getattr(torch, self.options.get("dtype", "float32"))
        return dtype

    def tokenizer(self) -> Any:
        """Padding on the left, with an id of its own where that is possible: TRL's PPO takes the first one for a response's end."""
        tokenizer = AutoTokenizer.from_pretrained(self.work.model, padding_side="left")
        if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
            tokenizer.pad_token_id = tokenizer.unk_token_id or 0
        return tokenizer

    def policy(self) -> Any:
        """The causal language model."""
        return AutoModelForCausalLM.from_pretrained(self.work.model, dtype=self.dtype)

    def scalar(self, pad: int) -> Any:
        """The reward or value model."""
        model = AutoModelForSequenceClassification.from_pretrained(self.work.model, num_labels=1, dtype=self.dtype)
        model.config.pad_token_id = pad
        return model

    def trainer_settings(self) -> dict[str, Any]:
        """What all trainers are told: nothing is saved, logged or checkpointed in between."""
        return {
            "output_dir": tempfile.mkdtemp(), "report_to": "none", "save_strategy": "no", "logging_steps": FOREVER, "disable_tqdm": True,
            "learning_rate": 1e-5, "lr_scheduler_type": "constant", "seed": self.work.seed, "use_cpu": True,
            "bf16": self.options.get("autocast", False), "gradient_checkpointing": False,
        }  # fmt: skip


class GatedSteps(TrainerCallback):
    """Holds a transformers trainer at the beginning of each step; ``counted`` is what the step's batches held."""

    def __init__(self, told: Told) -> None:
        self._told = told
        self._begin = 0.0
        self.counted = 0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._told.gate.wait()
        self.counted = 0
        self._begin = self._told.clock()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        seconds = self._told.clock() - self._begin
        self._told.gate.answer({"seconds": seconds, "tokens": self.counted})
