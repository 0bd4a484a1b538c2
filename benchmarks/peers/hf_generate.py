"""transformers' generate, in batches of ``chunk`` prompts: each batch waits for its longest response."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import StoppingCriteriaList

from benchmarks.bench_pipe import serve
from benchmarks.peers.common import Told
from benchmarks.peers.lengths import Lengths


def main() -> None:
    told = Told()
    model = told.policy().eval()
    model.generation_config.eos_token_id = None
    tokenizer = told.tokenizer()
    chunk = told.options["chunk"]

    def generate(prompts: list[list[int]], lengths: list[int]) -> int:
        batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        criteria = Lengths(batch["input_ids"].shape[1], torch.tensor(lengths))
        model.generate(
            **batch, max_new_tokens=max(lengths), do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([criteria]),
        )  # fmt: skip
        return criteria.drawn

    @torch.inference_mode()
    def step(**other: Any) -> Mapping[str, Any]:
        now = replace(told.work, **other)
        prompts, lengths = now.prompts(), now.response_lengths()
        begin = told.clock()
        drawn = sum(generate(prompts[i : i + chunk], lengths[i : i + chunk]) for i in range(0, len(prompts), chunk))
        return {"seconds": told.clock() - begin, "tokens": drawn}

    serve(told.gate, step)


if __name__ == "__main__":
    main()
