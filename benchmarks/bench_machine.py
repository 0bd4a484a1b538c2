"""What the machine is, and what it can do at most: matrix products and a memory copy, measured in the same run."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile", "avx_vnni")
SHAPES = {"gemm": (1024, 576, 1536), "gemm_decode": (16, 576, 1536)}


def describe(threads: int, clock: str) -> dict[str, Any]:
    """The processor and the libraries; nothing that names a host."""
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    first = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(info))}
    flags = set(first.get("flags", "").split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": first.get("model name", platform.processor()),
        "family": f"{first.get('cpu family', '?')}/{first.get('model', '?')}/{first.get('stepping', '?')}",
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "memory_gb": round(memory, 1),
        "threads": threads,
        "clock": clock,
        "python": platform.python_version(),
    }


def limits(threads: int, clock: str) -> dict[str, float]:
    """GFLOP/s and GB/s, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_machine", json.dumps({"threads": threads, "clock": clock})]
    root = Path(__file__).resolve().parent.parent
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    found: dict[str, float] = json.loads(out.stdout.splitlines()[-1])
    return found


def measure(told: Mapping[str, Any]) -> dict[str, float]:
    """The best of the ways that torch has, each one's median."""
    import torch

    from benchmarks.bench_pipe import CLOCKS

    torch.set_num_threads(told["threads"])
    clock = CLOCKS[told["clock"]]
    found = {}
    for name, (rows, inner, columns) in SHAPES.items():
        flops = 2.0 * rows * inner * columns
        for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            x, weight = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
            ways: list[Callable[[], Any]] = [partial(torch.nn.functional.linear, x, weight)]
            # Asked for bfloat16 on a processor with nothing better than AVX2, oneDNN raises.
            if torch.backends.mkldnn.is_available() and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
                ways.append(partial(torch.ops.mkldnn._linear_pointwise, x, weight, None, "none", [], ""))
            rates = [flops / _seconds(way, clock) / 1e9 for way in ways]
            found[f"{name}_{short}_gflops"] = max(rates)
            found[f"{name}_{short}_linear_gflops"] = rates[0]
    source, target = torch.ones(64 << 20), torch.empty(64 << 20)
    found["copy_gbs"] = 2.0 * source.nbytes / _seconds(lambda: target.copy_(source), clock) / 1e9
    found["read_gbs"] = source.nbytes / _seconds(source.sum, clock) / 1e9
    return {name: round(value, 2) for name, value in found.items()}


def _seconds(work: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Of one call: the median over calls that take about 0.3 s together."""
    work()
    begin = time.perf_counter()
    work()
    count = max(5, int(0.3 / max(time.perf_counter() - begin, 1e-6)))
    # So many calls at a time that the clock's grain does not count.
    batch = max(1, count // 20)
    times = []
    for _ in range(max(5, count // batch)):
        begin = clock()
        for _ in range(batch):
            work()
        times.append((clock() - begin) / batch)
    return statistics.median(times)


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
