"""TRL's PPO on the tasks of ``learning.py``; runs in an environment of its own with trl 1.12, the last release line with a PPO trainer.

python learning_peer_trl.py '{"model": ..., "prompts": ..., "reward": ..., "out": ..., and the settings}'
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import learning_rewards
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer


class PassIds(torch.nn.Module):
    """In the place of a reward model's backbone: hands the token ids on as if they were hidden states."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(hidden_states=[torch.stack([input_ids, attention_mask.long()], dim=-1).double()])


class TextReward(torch.nn.Module):
    """TRL takes a reward as a module with a backbone and a score; this one decodes the response and asks a function."""

    base_model_prefix = "backbone"

    def __init__(self, tokenizer: Any, prompt_tokens: int, reward: str) -> None:
        super().__init__()
        self.backbone = PassIds()
        self._tokenizer, self._start, self._function = tokenizer, prompt_tokens, getattr(learning_rewards, reward)

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        samples = []
        for ids, mask in zip(*hidden.long().unbind(dim=-1), strict=True):
            prompt, response = ids[: self._start], ids[self._start :][mask[self._start :].bool()]
            text = self._tokenizer.decode(prompt, skip_special_tokens=True)
            message = SimpleNamespace(messages=[SimpleNamespace(content=text)])
            samples.append(SimpleNamespace(prompt=message, response=self._tokenizer.decode(response, skip_special_tokens=True)))
        values = torch.tensor(self._function(samples), dtype=torch.float32)
        return values[:, None, None].expand(*hidden.shape[:2], 1)


def main() -> None:
    task = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    torch.manual_seed(task["seed"])
    tokenizer = AutoTokenizer.from_pretrained(task["model"], padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32) for _ in range(2))
    critic = AutoModelForSequenceClassification.from_pretrained(task["model"], num_labels=1, dtype=torch.float32)
    torch.nn.init.normal_(critic.score.weight, std=(critic.config.hidden_size + 1) ** -0.5)  # as alignkit's head, and InstructGPT's
    prompts = [json.loads(line)["prompt"] for line in Path(task["prompts"]).read_text().splitlines()]
    ids = tokenizer(prompts, add_special_tokens=False).input_ids
    config = PPOConfig(
        output_dir=tempfile.mkdtemp(), seed=task["seed"], use_cpu=True, report_to="none", save_strategy="no", logging_steps=1,
        disable_tqdm=True, bf16=False, num_sample_generations=0, stop_token="eos",
        per_device_train_batch_size=task["episodes"], gradient_accumulation_steps=1, num_mini_batches=1,
        local_rollout_forward_batch_size=task["episodes"], total_episodes=task["episodes"] * task["iterations"],
        num_ppo_epochs=task["epochs"], response_length=task["max_new_tokens"], temperature=1.0, kl_coef=task["kl_coef"],
        cliprange=0.2, cliprange_value=task["value_clip"], vf_coef=0.1, gamma=1.0, lam=0.95, whiten_rewards=False, missing_eos_penalty=None,
        learning_rate=task["learning_rate"], lr_scheduler_type="constant", adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-5,
        weight_decay=0.0, max_grad_norm=1.0,
    )  # fmt: skip
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=reference, value_model=critic,
        reward_model=TextReward(tokenizer, len(ids[0]), task["reward"]), train_dataset=Dataset.from_dict({"input_ids": ids}),
    )  # fmt: skip
    curve: list[tuple[float, float]] = []

    def log(metrics: dict[str, float], *rest: Any, **options: Any) -> None:
        if "objective/scores" in metrics:
            curve.append((float(metrics["objective/kl"]), float(metrics["objective/scores"])))
            print(f"{len(curve)} of {task['iterations']}: {curve[-1]}", file=sys.stderr, flush=True)

    trainer.log = log
    trainer.train()
    Path(task["out"]).write_text(json.dumps(curve))


if __name__ == "__main__":
    main()
