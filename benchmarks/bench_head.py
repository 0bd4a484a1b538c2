"""Peak memory of head and loss by themselves: alignkit's, or logits of all positions. One way a process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from alignkit.ops.logprobs import selective_logprobs, token_logprobs
from benchmarks.bench_pipe import CLOCKS, Gate, memory, serve, settings
from benchmarks.bench_work import Work

HIDDEN, VOCABULARY = 576, 49152


def main() -> None:
    told, gate = settings(), Gate()
    torch.set_num_threads(told["threads"])
    work, clock = Work(**told["work"]), CLOCKS[told["clock"]]
    generator = torch.Generator().manual_seed(0)
    count = work.batch * work.response
    hidden = torch.randn(count, HIDDEN, generator=generator).requires_grad_()
    weight = (torch.randn(VOCABULARY, HIDDEN, generator=generator) / HIDDEN**0.5).requires_grad_()
    tokens = torch.randint(VOCABULARY, (count,), generator=generator)

    def step() -> Mapping[str, Any]:
        forget_peak()
        start, begin = memory()["rss_mb"], clock()
        if told["head"] == "selective":
            logprobs, _ = selective_logprobs(hidden, weight, tokens)
        else:
            logprobs = token_logprobs(hidden @ weight.T, tokens)
        (-logprobs.mean()).backward()
        seconds = clock() - begin
        loss = round(float(logprobs.detach().mean()), 4)
        return {"seconds": seconds, "tokens": count, "above_start_mb": memory()["peak_mb"] - start, "loss": loss}

    serve(gate, step)


def forget_peak() -> None:
    """From here on the peak is counted anew, where the kernel lets a process say so."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("the peak of loading counts too", flush=True)


if __name__ == "__main__":
    main()
