"""TRL's PPOTrainer. 1.12.0 is the last release that has one; it ignores bf16 and gradient_checkpointing without saying so."""

from __future__ import annotations

from typing import Any

import torch
import trl
import trl.experimental.ppo.ppo_trainer as trainer_module
from datasets import Dataset
from transformers import StoppingCriteriaList, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

from benchmarks.peers.common import FOREVER, Told
from benchmarks.peers.lengths import Lengths


class Clocked(TrainerCallback):
    """Waits before an iteration's rollout, and tells at its end where the time went."""

    def __init__(self, told: Told, reward_model: Any) -> None:
        self._told, self._reward_model = told, reward_model
        self.begin = self.generated = self.learning = self.scoring = 0.0
        self.drawn = 0

    def hold(self, trainer: PPOTrainer, policy: Any) -> None:
        """Put the gate before generation, and clocks where the phases meet."""
        clock = self._told.clock
        generation, reward, accumulate = trainer_module.batch_generation, trainer_module.get_reward, trainer.accelerator.accumulate
        generate, lengths = policy.generate, torch.tensor(self._told.work.response_lengths())

        def forced(*args: Any, **kwargs: Any) -> Any:
            criteria = Lengths(kwargs["input_ids"].shape[1], lengths)
            out = generate(*args, stopping_criteria=StoppingCriteriaList([criteria]), **kwargs)
            self.drawn += criteria.drawn
            return out

        def gated_generation(*args: Any, **kwargs: Any) -> Any:
            self._told.gate.wait()
            self.learning = self.scoring = 0.0
            self.drawn = 0
            self.begin = clock()
            out = generation(*args, **kwargs)
            self.generated = clock()
            return out

        def timed_reward(model: Any, *args: Any, **kwargs: Any) -> Any:
            begin = clock()
            out = reward(model, *args, **kwargs)
            if model is self._reward_model:
                self.scoring += clock() - begin
            return out

        def timed_accumulate(*args: Any) -> Any:
            self.learning = self.learning or clock()
            return accumulate(*args)

        policy.generate = forced
        trainer_module.batch_generation, trainer_module.get_reward = gated_generation, timed_reward
        trainer.accelerator.accumulate = timed_accumulate

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        end = self._told.clock()
        parts = {
            "rollout": self.generated - self.begin, "scoring": self.scoring,
            "forward": self.learning - self.generated - self.scoring, "update": end - self.learning,
        }  # fmt: skip
        self._told.gate.answer({"seconds": end - self.begin, "parts": parts, "tokens": self.drawn})


def main() -> None:
    told = Told()
    told.gate.facts["versions"]["trl"] = trl.__version__
    work, tokenizer = told.work, told.tokenizer()
    policy, reference = told.policy(), told.policy()
    pad = tokenizer.pad_token_id
    policy.generation_config.pad_token_id = pad
    reward, value = told.scalar(pad), told.scalar(pad)
    config = PPOConfig(
        per_device_train_batch_size=work.batch, gradient_accumulation_steps=1, num_mini_batches=work.minibatches,
        num_ppo_epochs=work.epochs, total_episodes=work.batch * FOREVER, response_length=work.response, temperature=1.0,
        local_rollout_forward_batch_size=work.batch, num_sample_generations=0, kl_coef=0.05, **told.trainer_settings(),
    )  # fmt: skip
    clocked = Clocked(told, reward)
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward, value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": work.prompts()}), callbacks=[clocked],
    )  # fmt: skip
    clocked.hold(trainer, policy)
    trainer.train()


if __name__ == "__main__":
    main()
