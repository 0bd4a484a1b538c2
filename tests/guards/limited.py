"""Steps of SFT in a process with little memory to spare, beside the same steps with plenty of it. Prints what came of them as JSON."""

import json
import resource
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from alignkit.models.config import TinyLMConfig
from alignkit.testing import make_context
from alignkit.types import Plan, TokenRow
from alignkit_sft import SFTConfig
from alignkit_sft.update import SFT

ROWS = 64  # of up to 256 tokens: all at once take over 300 MB, many times what the test leaves to spare
PLENTY = 100_000  # tokens: all rows in one microbatch


def main(folder: Path, spare_megabytes: int) -> None:
    torch.set_num_threads(1)
    noise = torch.Generator().manual_seed(0)
    drawn = [torch.randint(4, 260, (224 + i % 32,), generator=noise).tolist() for i in range(ROWS)]
    rows = [TokenRow(str(i), tuple(ids), (True,) * len(ids)) for i, ids in enumerate(drawn)]
    shape = TinyLMConfig(architecture="gpt2", hidden_size=128, layers=2, positions=256)
    context = replace(make_context(folder, plan=Plan(steps=4, rows=len(rows)), policy=shape), checks=False)

    def step(tokens: int, dropout: float, megabytes: int = 0, batch: list[TokenRow] = rows) -> dict[str, Any]:
        sft = SFT(SFTConfig(learning_rate=1e-3, microbatch_tokens=tokens, dropout=dropout), context)
        if megabytes:
            now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + megabytes * 2**20, resource.RLIM_INFINITY))
        figures = sft.update(batch)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        state = sft.state()
        used = state.values["learner"]["microbatch_tokens"]
        return {"loss": figures["loss/nll_nats"], "norm": figures["optimizer/grad_norm"], "tokens": used, "tensors": state.tensors}

    # Whatever a first step makes for good, such as threads and buffers of libraries, is there before the limit is.
    step(PLENTY, 0.0, batch=rows[:1])
    limited = step(PLENTY, 0.0, spare_megabytes)
    dropped = step(PLENTY, 0.2, spare_megabytes)
    plenty = step(PLENTY, 0.0)
    small = step(dropped["tokens"], 0.2)
    moments = [name for name in plenty["tensors"] if name.startswith("adam.exp_avg/")]
    report = {
        "row_tokens": sum(len(row.ids) for row in rows),
        "limited": {name: limited[name] for name in ("loss", "norm", "tokens")},
        "plenty": {name: plenty[name] for name in ("loss", "norm", "tokens")},
        "gradients_apart": max(float((limited["tensors"][name] - plenty["tensors"][name]).abs().max()) for name in moments),
        "dropped_tokens": dropped["tokens"],
        "dropped_alike": all(torch.equal(tensor, small["tensors"][name]) for name, tensor in dropped["tensors"].items()),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
