"""Rollouts and updates against what the card can do: a large bfloat16 matrix product and a device copy, measured in the same run.

    python -m benchmarks.gpu [--shapes 135m 1b] [--rows 16 64 256] [--prompt 128] [--response 128] [--pairs 3] [--out FILE]

Models have random weights in the shape of real ones, and compute in bfloat16. Rollouts are measured turn by turn with transformers'
``generate``, and with alignkit's own steps started call by call instead of as CUDA graphs. Without a GPU it runs on the CPU
(``--shapes tiny``), which shows that it runs and nothing about a card.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from alignkit.adamw import AdamWConfig
from alignkit.data.codec import TemplateCodec
from alignkit.data.collate import collate
from alignkit.learner import Learner
from alignkit.models import adapters, kernels
from alignkit.models.attention import prepare
from alignkit.models.causal_lm import CausalPolicy, pick_device
from alignkit.models.config import TuningConfig
from alignkit.rollout.decoder import Decoder, Request
from alignkit.rollout.launch import CallByCall
from alignkit.types import TokenRow
from benchmarks.bench_setup import byte_tokenizer
from benchmarks.bench_work import Work

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    # SmolLM2-135M
    "135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    # Llama-3.2-1B
    "1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["135m", "1b"], help="models")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 256], help="responses decoded at once, and rows of an update")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the longest prompt")
    parser.add_argument("--response", type=int, default=128, help="tokens of the longest response")
    parser.add_argument("--pairs", type=int, default=3, help="turns of each")
    parser.add_argument("--out", type=Path, help="figures as JSON")
    told = parser.parse_args()
    device = pick_device()
    card = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU: these are figures of the CPU"
    limits = {"flops": product_rate(device), "bytes": copy_rate(device)}
    rates = f"{limits['flops'] / 1e12:.2f} TFLOP/s in bfloat16, {limits['bytes'] / 1e12:.2f} TB/s read and written"
    print(f"{card}; torch {torch.__version__}: {rates}; {kernels.chosen()}")
    found: list[dict[str, Any]] = []
    for shape in told.shapes:
        policy = random_policy(SHAPES[shape], device)
        for rows in told.rows:
            work = Work(model=shape, batch=rows, prompt=told.prompt, response=told.response, vocabulary=SHAPES[shape]["vocab_size"])
            for one in (*rollouts(policy, work, limits, told.pairs), update(policy, work, limits)):
                found.append({"shape": shape, **one})
                print(line(found[-1]), flush=True)
    if device.type == "cuda":
        print(f"peak memory: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    if told.out:
        told.out.write_text(json.dumps({"card": card, "torch": torch.__version__, "limits": limits, "rows": found}, indent=1) + "\n")


def line(row: Mapping[str, Any]) -> str:
    """One figure to read."""
    against = {"vs_peer": "generate", "vs_calls": "call by call"}
    ratios = "".join(f", {row[key]:.2f} times {name}" for key, name in against.items() if key in row)
    figures = f"{row['seconds'] * 1e3:.0f} ms, {row['rate']:.0f} tokens/s, {row['share']:.0%} of the limit"
    return f"{row['shape']}, {row['work']}: {figures}{ratios}"


def random_policy(shape: Mapping[str, Any], device: torch.device) -> CausalPolicy:
    """A policy with random weights, in bfloat16 with float32 masters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True, pad_token_id=0, eos_token_id=3, bos_token_id=None)).eval()
    prepare(model)
    adapters.tune(model, TuningConfig(), 0)
    return CausalPolicy(model, TemplateCodec(byte_tokenizer(shape["vocab_size"]), (3,)), tuning=TuningConfig(), precision="bfloat16")


def rollouts(policy: CausalPolicy, work: Work, limits: Mapping[str, float], pairs: int) -> list[dict[str, Any]]:
    """Fixed lengths beside ``generate``, and ragged ones. What it costs to prepare the weights is in it."""
    prompts = [(prompt * work.prompt)[: work.prompt] for prompt in work.prompts()]
    config = policy.module.config
    same = torch.tensor(prompts, device=policy.device)

    def generate() -> None:
        model.generate(
            same, attention_mask=torch.ones_like(same), max_new_tokens=work.response, min_new_tokens=work.response, do_sample=True,
            top_k=0, top_p=1.0, pad_token_id=0,
        )  # fmt: skip

    def call_by_call() -> None:
        with mock.patch("alignkit.rollout.decoder.launch_on", return_value=CallByCall()):
            decode(policy, prompts, [work.response] * work.batch)

    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(config).to(policy.device, torch.bfloat16).eval()
    ours, theirs, calls = turns(pairs, lambda: decode(policy, prompts, [work.response] * work.batch), generate, call_by_call)
    fixed = rate("rollout", config, work.batch * [work.prompt], work.batch * [work.response], ours, limits)
    fixed |= {"vs_peer": statistics.median(ratio(theirs, ours)), "vs_calls": statistics.median(ratio(calls, ours))}
    lengths = work.response_lengths()
    (ours,) = turns(pairs, lambda: decode(policy, prompts, lengths))
    return [fixed, rate("ragged rollout", config, work.batch * [work.prompt], lengths, ours, limits)]


def rate(
    name: str, config: Any, prompts: Sequence[int], lengths: Sequence[int], seconds: Sequence[float], limits: Mapping[str, float]
) -> dict[str, Any]:
    """What a rollout must compute, and read from memory: in each step the weights, and the past of every row."""
    weights, past = counts(config)
    floor = 2 * weights * sum(prompts) / limits["flops"]
    for step in range(max(lengths)):
        rows = [prompt + step for prompt, length in zip(prompts, lengths, strict=True) if step < length]
        floor += max(2 * weights * len(rows) / limits["flops"], 2 * (weights + past * sum(rows)) / limits["bytes"])
    middle = statistics.median(seconds)
    return {"work": f"{name} of {len(lengths)}", "seconds": middle, "rate": sum(lengths) / middle, "share": floor / middle}


def update(policy: CausalPolicy, work: Work, limits: Mapping[str, float]) -> dict[str, Any]:
    """A step of the likelihood of the responses, with the optimizer's."""
    texts = list(zip(work.prompts(), work.responses(), strict=True))
    rows = [TokenRow(str(i), (*a, *b), (False,) * len(a) + (True,) * len(b)) for i, (a, b) in enumerate(texts)]
    batch = collate(rows)
    learner = Learner(policy.module, AdamWConfig(), steps=1000)

    def loss() -> tuple[torch.Tensor, dict[str, float]]:
        return -policy.score_tokens(batch).logprobs.sum() / batch.loss_mask.sum(), {}

    (seconds,) = turns(5, lambda: learner.step(lambda tokens: [loss]))
    tokens, config = int(batch.mask.sum()), policy.module.config
    head = config.vocab_size * config.hidden_size
    flops = 6 * ((counts(config)[0] - head) * tokens + head * int(batch.loss_mask.sum()))
    middle = statistics.median(seconds)
    return {"work": f"update on {work.batch}", "seconds": middle, "rate": tokens / middle, "share": flops / limits["flops"] / middle}


def counts(config: Any) -> tuple[int, int]:
    """Weights that a token is multiplied with, and numbers of a token's keys and values."""
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    size = config.hidden_size // config.num_attention_heads
    layers, layer = config.num_hidden_layers, config.hidden_size * (heads * size + config.hidden_size + 3 * config.intermediate_size)
    return layers * layer + config.vocab_size * config.hidden_size, 2 * layers * config.num_key_value_heads * size


def decode(policy: CausalPolicy, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
    """All at once, to the end."""
    with policy.decoding() as model:
        decoder = Decoder(model, max_rows=len(prompts))
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            decoder.add(Request(tuple(prompt), length, 1.0, (), i))
        while decoder.busy:
            decoder.step()


def product_rate(device: torch.device) -> float:
    """FLOP/s of a large matrix product."""
    size = 8192 if device.type == "cuda" else 512
    left, right = torch.randn(2, size, size, device=device).bfloat16().unbind()
    return 2 * size**3 / min(turns(10, lambda: left @ right)[0])


def copy_rate(device: torch.device) -> float:
    """Bytes read and written a second."""
    left = torch.randn(1 << (30 if device.type == "cuda" else 26), device=device)
    right = torch.empty_like(left)
    return 2 * left.nbytes / min(turns(5, lambda: right.copy_(left))[0])


def turns(times: int, *works: Callable[[], object]) -> list[list[float]]:
    """Seconds of each, turn by turn, after one that is not counted; the card has done its work when the clock is read."""
    found: list[list[float]] = [[] for _ in works]
    for _ in range(times + 1):
        for work, seconds in zip(works, found, strict=True):
            synchronize()
            started = time.perf_counter()
            work()
            synchronize()
            seconds.append(time.perf_counter() - started)
    return [seconds[1:] for seconds in found]


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    """Of each pair."""
    return [a / b for a, b in zip(theirs, ours, strict=True)]


def synchronize() -> None:
    """Wait for the card."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
