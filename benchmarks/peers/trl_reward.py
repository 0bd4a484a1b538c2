"""TRL's RewardTrainer. It knows pairs alone, so K responses become all K(K-1)/2 of them; one optimizer step is on all pairs."""

from __future__ import annotations

from typing import Any

import trl
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from benchmarks.peers.common import FOREVER, GatedSteps, Told


def main() -> None:
    told = Told()
    told.gate.facts["versions"]["trl"] = trl.__version__
    pairs, accumulate = told.work.comparisons(), told.options.get("accumulate", 1)
    rows = Dataset.from_dict({"chosen_ids": [better for better, _ in pairs], "rejected_ids": [worse for _, worse in pairs]})
    config = RewardConfig(
        per_device_train_batch_size=len(pairs) // accumulate, gradient_accumulation_steps=accumulate, max_steps=FOREVER,
        max_length=told.work.prompt + told.work.response, **told.trainer_settings(),
    )  # fmt: skip
    steps, tokenizer = GatedSteps(told), told.tokenizer()
    model = told.scalar(tokenizer.pad_token_id)
    trainer = RewardTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[steps])
    plain = trainer.compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        steps.counted += len(inputs["input_ids"]) // 2
        return plain(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()


if __name__ == "__main__":
    main()
