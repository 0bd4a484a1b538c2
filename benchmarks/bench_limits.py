"""Which share of what the machine can do at most is reached, from counts of products and of weights read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.bench_table import Result, markdown, number
from benchmarks.bench_work import Work

TRUNK, HEAD = 106_203_456, 28_311_552
"""Weights of SmolLM2-135M: all but the embedding, and the embedding, which is the head as well."""


def shares(rows: Sequence[Result], limits: Mapping[str, float]) -> str:
    """A table of seconds that the limits allow over seconds that were taken, for the rows of the 135M model."""
    lines = [
        [
            f"`{row['name']}`", phase, number(taken), number(flops / 1e9), number(flops / gemm / 1e9), number(reads / 1e9),
            number(reads / limits["copy_gbs"] / 1e9), f"{100 * max(flops / gemm, reads / limits['copy_gbs']) / 1e9 / taken:.0f} %",
        ]
        for row in rows
        if "135m" in row["name"] and "time" in row["metric"] and "work" in row
        for gemm in [limits["gemm_bf16_gflops" if in_bfloat16(row) else "gemm_fp32_gflops"]]
        for phase, taken, flops, reads in phases_of(row)
    ]  # fmt: skip
    head = ["row", "phase", "s, ours", "GFLOP needed", "s at the GEMM's rate", "GB of weights read", "s at the copy's rate", "share"]
    return markdown(head, lines)


def in_bfloat16(row: Result) -> bool:
    """Whether our side multiplied in it; ``auto`` is what the probe chose."""
    kernels = row.get("kernels") or {}
    return row["precision"].startswith("bf16") or (row["precision"].startswith("auto") and bool(kernels.get("bfloat16")))


def phases_of(row: Result) -> Iterator[tuple[str, float, float, float]]:
    """Phase, seconds taken, floating-point operations, bytes of weights read. Padding, logits that nobody reads: none of it is needed."""
    work, mine = Work(**row["work"]), row["ours"]
    prompt, response = work.tokens()
    everything = prompt * work.k + response
    weight = 2 if in_bfloat16(row) else 4
    generating = 2.0 * (TRUNK * everything + HEAD * response), float(weight * (TRUNK + HEAD) * max(work.response_lengths()))
    if row["name"].startswith("ppo"):
        learning = 6.0 * work.epochs * (2 * TRUNK * everything + HEAD * response)
        if "rollout" in mine["parts"]:
            yield "rollout", mine["parts"]["rollout"], *generating
        if "update" in mine["parts"]:
            yield "update", mine["parts"]["update"], learning, 0.0
    elif row["name"].startswith("sft"):
        yield "step", mine["seconds"], 6.0 * (TRUNK * everything + HEAD * response), 0.0
    elif row["name"].startswith("reward"):
        # The prompt of K responses is needed once.
        yield "step", mine["seconds"], 6.0 * TRUNK * (prompt + response), 0.0
    elif row["name"].startswith(("rollout", "concurrent")):
        yield "rollout", mine["seconds"], *generating
