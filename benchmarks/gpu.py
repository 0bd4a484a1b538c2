"""Rollouts and updates against what the card can do: a large bfloat16 matrix product and a device copy, measured in the same run.

    python benchmarks/gpu.py --model FOLDER [--rows 64 256] [--prompt 128] [--response 128]

Prints one line a figure. Without a GPU it runs on the CPU, which shows that it runs and nothing about a card.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from alignkit.adamw import AdamWConfig
from alignkit.data.collate import collate
from alignkit.learner import Learner
from alignkit.models.causal_lm import CausalPolicy, load, pick_device
from alignkit.models.config import TuningConfig
from alignkit.rollout.decoder import Decoder, Request
from alignkit.types import TokenRow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a transformers folder")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256], help="responses decoded at once")
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--response", type=int, default=128, help="tokens")
    told = parser.parse_args()
    device = pick_device()
    print(torch.cuda.get_device_name() if device.type == "cuda" else "no GPU: these are figures of the CPU")
    policy = load(told.model, tuning=TuningConfig(), precision="auto", trainable=True, seed=0)
    dtype = torch.float32 if policy.exact else torch.bfloat16
    rate, copying = product_rate(device, dtype), copy_rate(device)
    weights = sum(weight.numel() for weight in policy.module.parameters())
    print(f"limit: {rate / 1e12:.2f} TFLOP/s in {dtype}, {copying / 1e9:.0f} GB/s copied; {weights / 1e6:.0f} million weights")
    for rows in told.rows:
        seconds = fastest(lambda rows=rows: decode(policy, rows, told.prompt, told.response), 3)
        # A step reads each weight once.
        floor = told.response * max(weights * dtype.itemsize / copying, 2 * weights * rows / rate) + 2 * weights * rows * told.prompt / rate
        print(f"rollout of {rows}: {rows * told.response / seconds:.0f} tokens/s, {floor / seconds:.0%} of the limit")
        batch = collate([row(i, told.prompt, told.response, vocabulary(policy)) for i in range(rows)])
        learner = Learner(policy.module, AdamWConfig(), steps=1000)

        def update(batch=batch, learner=learner) -> None:
            learner.step(lambda tokens: [lambda: (-policy.score_tokens(batch).logprobs.sum() / batch.loss_mask.sum(), {})])

        seconds = fastest(update, 3)
        work = 6 * weights * int(batch.mask.sum())
        print(f"update on {rows}: {int(batch.mask.sum()) / seconds:.0f} tokens/s, {work / rate / seconds:.0%} of the limit")
    if device.type == "cuda":
        print(f"peak memory: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


def decode(policy: CausalPolicy, rows: int, prompt: int, response: int) -> None:
    with policy.decoding() as model:
        decoder = Decoder(model, max_rows=rows)
        for i in range(rows):
            decoder.add(Request(row(i, prompt, 0, vocabulary(policy)).ids, response, 1.0, (), i))
        while decoder.busy:
            decoder.step()


def row(i: int, prompt: int, response: int, tokens: int) -> TokenRow:
    ids = tuple((7919 * i + 104729 * j) % tokens for j in range(prompt + response))
    return TokenRow(str(i), ids, (False,) * prompt + (True,) * response)


def vocabulary(policy: CausalPolicy) -> int:
    size: int = policy.module.get_parameter("model.embed_tokens.weight").shape[0]
    return size


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = torch.randn(2, size, size, device=device).to(dtype).unbind()
    return 2 * size**3 / fastest(lambda: left @ right, 10)


def copy_rate(device: torch.device) -> float:
    """Bytes read a second, the same number being written."""
    left = torch.randn(1 << (30 if device.type == "cuda" else 26), device=device)
    right = torch.empty_like(left)
    return left.nbytes / fastest(lambda: right.copy_(left), 5)


def fastest(work: Callable[[], object], times: int) -> float:
    """Seconds of the fastest of several goes; the card has done its work when the clock is read."""
    found = []
    for _ in range(times + 1):
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        found.append(time.perf_counter() - started)
    return min(found[1:])


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
