"""TRL's SFTTrainer, padded as by default or packed; the data is tokenised already, and the loss is on completions alone."""

from __future__ import annotations

from typing import Any

import trl
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from benchmarks.peers.common import FOREVER, GatedSteps, Told


def main() -> None:
    told = Told()
    told.gate.facts["versions"]["trl"] = trl.__version__
    work, packing = told.work, told.options.get("packing", False)
    demonstrations = work.demonstrations()
    rows = Dataset.from_dict(
        {
            "input_ids": [prompt + response for prompt, response in demonstrations],
            "completion_mask": [[0] * len(prompt) + [1] * len(response) for prompt, response in demonstrations],
            "labels": [[-100] * len(prompt) + response for prompt, response in demonstrations],
        }
    )
    width = work.prompt + work.response
    # A step is all demonstrations, so when they are packed it is as many bins as they fill.
    batch = len(trl.pack_dataset(rows, width, "bfd")) if packing else work.batch
    config = SFTConfig(
        per_device_train_batch_size=batch, max_steps=FOREVER, max_length=width, packing=packing, completion_only_loss=True,
        dataset_kwargs={"skip_prepare_dataset": not packing}, **told.trainer_settings(),
    )  # fmt: skip
    steps = GatedSteps(told)
    trainer = SFTTrainer(model=told.policy(), args=config, train_dataset=rows, processing_class=told.tokenizer(), callbacks=[steps])
    plain = trainer.compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        steps.counted += int((inputs["labels"] != -100).sum())
        return plain(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()


if __name__ == "__main__":
    main()
