"""The generated part of docs/performance.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.bench_limits import shares
from benchmarks.bench_table import Result, interval, markdown, notes, number, phases, ratios, seconds


def page(results: Mapping[str, Any]) -> str:
    """Machine, ratios, absolute figures, phases of PPO, shares of the limit, rates, growth."""
    rows = results["rows"]
    compared = with_a_peer(rows)
    parts = [
        ("The machine", machine(results["machine"], results["limits"], rows)),
        ("Against peers", ratios(compared) + "\n" + notes(compared)),
        ("What was measured", seconds(compared)),
        ("Phases of a PPO iteration", phases(compared)),
        ("Share of the machine's limit", shares(compared, results["limits"])),
        ("Rollout: tokens a second", rates(rows)),
        ("Growth", growth(rows)),
    ]
    return "\n".join(f"## {title}\n\n{text}" for title, text in parts if text.strip())


def with_a_peer(rows: Sequence[Result]) -> list[Result]:
    """The rows of the first table: those that have a peer or a bar, but for rates, which have a table of their own."""
    return [row for row in rows if (row["theirs"] or row["must"] is not None) and "tokens_per_second" not in row]


def machine(about: Mapping[str, Any], limits: Mapping[str, float], rows: Sequence[Result]) -> str:
    """What ran, on what."""
    versions: dict[str, set[str]] = {}
    for row in rows:
        for library, version in row.get("versions", {}).items():
            versions.setdefault(library, set()).add(version)
    libraries = ", ".join(f"{library} {' and '.join(sorted(found))}" for library, found in sorted(versions.items()))
    found = dict.fromkeys(", ".join(f"{key}: {value}" for key, value in row["kernels"].items()) for row in rows if row.get("kernels"))
    chosen = f" What alignkit found to be fastest when it tried: {'; or '.join(found)}." if found else ""
    clock = "wall time" if about["clock"] == "wall" else "process CPU time"
    return (
        f"{about['cpu']} (family/model/stepping {about['family']}), {about['cores']} cores, {about['memory_gb']} GB; "
        f"{' '.join(about['flags'])}. {about['threads']} threads, {clock}. Python {about['python']}, {libraries}.{chosen}\n\n"
        + markdown(
            ["limit", "fp32", "bf16"],
            [
                [
                    f"GEMM {shape}, GFLOP/s (best way; torch's linear)",
                    *(f"{number(limits[f'{key}_{p}_gflops'])} ({number(limits[f'{key}_{p}_linear_gflops'])})" for p in ("fp32", "bf16")),
                ]
                for shape, key in (("1024x576x1536", "gemm"), ("16x576x1536", "gemm_decode"))
            ],
        )
        + f"\nMemory: copy {number(limits['copy_gbs'])} GB/s (both ends), read {number(limits['read_gbs'])} GB/s.\n"
    )


def rates(rows: Sequence[Result]) -> str:
    """By batch size and length distribution."""
    lines = [
        [f"`{row['name']}`", *(number(found[key]) for key in ("ours", "decoding", "theirs")), number(row["ratio"]), interval(row)]
        for row in rows
        if (found := row.get("tokens_per_second"))
    ]
    return markdown(["row", "ours", "ours, weights once prepared", "HF generate, batch of 16", "ratio", "spread"], lines)


def growth(rows: Sequence[Result]) -> str:
    """The points of the curves, the peak of long rows, and what is left after many iterations."""
    firsts: dict[str, float] = {}
    for row in rows:
        if "curve" in row:
            firsts.setdefault(row["curve"], row["ours"]["seconds"])
    points = [
        [f"`{row['name']}`", *map(number, (row["x"], taken, taken / firsts[row["curve"]], row["ours"]["peak_mb"]))]
        for row in rows
        if "curve" in row and (taken := row["ours"]["seconds"])
    ]
    alone = [row for row in rows if not row["theirs"] and row["must"] is None and "curve" not in row]
    others = [[f"`{row['name']}`", number(row["ratio"]), row["metric"], row["note"]] for row in alone]
    curves = markdown(["point", "x", "seconds", "over the first", "peak MB so far"], points)
    figure = "![Time against batch, length, K and model size](growth.svg)\n\n" if points else ""
    return f"{figure}{curves}\n{markdown(['figure', 'value', 'of what', 'note'], others)}"
