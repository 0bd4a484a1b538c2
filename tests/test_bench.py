"""The speed benchmark's arithmetic, and its worker protocol with alignkit's side alone. Nothing here depends on a time."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bench_growth import GROWTH, growth_figure, relative
from benchmarks.bench_limits import HEAD, TRUNK, in_bfloat16, phases_of
from benchmarks.bench_page import page
from benchmarks.bench_pipe import Worker, WorkerError
from benchmarks.bench_rows import Group, Row, ours, quick_groups, real_groups, tiny_groups
from benchmarks.bench_table import between_markers, inexact, merged, phases, ratios, reached, result, spread, unequal
from benchmarks.bench_work import Work
from tests.fakes import tiny_folder

WORK = Work(model="somewhere", batch=3, prompt=8, response=10, vocabulary=260)
GROUP = Group(
    work=WORK,
    sides={"alignkit": ours("ppo"), "peer": ours("ppo", label="somebody")},
    rows=(Row(name="some_row", precision="fp32", must=2.0, aim=4.0),),
    checked=("alignkit",),
)


def answer(seconds: float, tokens: int = 7, peak: float = 100.0, **more: Any) -> dict[str, Any]:
    return {"seconds": seconds, "tokens": tokens, "peak_mb": peak, **more}


def turns(*pairs: tuple[float, float]) -> list[dict[str, dict[str, Any]]]:
    return [{"alignkit": answer(mine), "peer": answer(theirs, peak=200.0)} for mine, theirs in pairs]


def test_a_ratio_is_of_each_pair_and_the_row_is_their_median() -> None:
    row = result(GROUP.rows[0], GROUP, turns((1.0, 3.0), (2.0, 4.0), (1.0, 5.0)), {})
    assert (row["ratio"], row["low"], row["high"], row["pairs"]) == (3.0, 2.0, 5.0, 3)
    assert (row["better"], row["must"], row["peer"]) == ("higher", 2.0, "somebody")
    assert (row["ours"]["seconds"], row["theirs"]["seconds"]) == (1.0, 4.0)


def test_memory_is_ours_over_the_peers_at_the_end() -> None:
    row = result(Row(name="m", precision="fp32", metric="memory", must=1.0), GROUP, turns((1.0, 3.0), (1.0, 3.0)), {})
    assert (row["ratio"], row["pairs"], row["better"]) == (0.5, 1, "lower")


def test_an_error_is_that_of_the_first_step() -> None:
    first = {"alignkit": answer(1.0, logprob_error=3e-5)}
    row = result(Row(name="e", precision="fp32", metric="error", peer=None), GROUP, turns((1.0, 1.0)), first)
    assert (row["ratio"], row["theirs"], row["peer"]) == (3e-5, None, "")


def test_the_median_of_an_even_number_is_between() -> None:
    assert spread([4.0, 1.0, 2.0, 8.0]) == (3.0, 1.0, 8.0)


def test_sides_that_draw_different_numbers_of_tokens_are_reported() -> None:
    assert unequal(GROUP, turns((1.0, 1.0))) == []
    uneven = [{"alignkit": answer(1.0, tokens=7), "peer": answer(1.0, tokens=8)}]
    assert unequal(GROUP, uneven) == ["some_row: the sides did not do equally much: {'alignkit': 7, 'peer': 8}"]


def test_float32_must_be_exact_and_bfloat16_need_not() -> None:
    off = {"alignkit": answer(1.0, logprob_error=2e-4)}
    assert inexact(GROUP, off) == ["some_row: alignkit: recorded log-probabilities are 0.0002 nats off the training forward"]
    assert inexact(GROUP, {"alignkit": answer(1.0, logprob_error=float("nan"))}) != []
    rough = Group(work=WORK, sides={"alignkit": ours("ppo", "bfloat16")}, rows=GROUP.rows, checked=("alignkit",))
    assert inexact(rough, off) == []


@pytest.mark.parametrize(
    ("ratio", "better", "bars", "word"),
    [
        (2.5, "higher", (2.0, 3.0), "must"),
        (3.5, "higher", (2.0, 3.0), "aim"),
        (1.9, "higher", (2.0, 3.0), "**no**"),
        (0.7, "lower", (1.0, 0.6), "must"),
        (1.1, "lower", (1.0, 0.6), "**no**"),
        (9.0, "higher", (None, None), ""),
    ],
)
def test_which_bar_a_row_reaches(ratio: float, better: str, bars: tuple[float | None, float | None], word: str) -> None:
    assert reached({"ratio": ratio, "better": better, "must": bars[0], "aim": bars[1]}) == word


def test_the_table_has_a_line_a_row() -> None:
    table = ratios([result(GROUP.rows[0], GROUP, turns((1.0, 3.0)), {})])
    assert table.splitlines()[2] == "| `some_row` | 3 | 3 to 3 | 1 | 2 | 4 | must | somebody | fp32 |"


def test_phases_are_those_of_iterations_alone() -> None:
    def row(name: str, ours: dict[str, float], theirs: dict[str, float]) -> dict[str, Any]:
        return {"name": name, "metric": "peer's time / ours", "ours": {"parts": ours}, "theirs": {"parts": theirs}}

    ours = {"rollout": 1.0, "scoring": 2.0, "forward": 1.0, "update": 4.0}
    iteration, rollout = row("iteration", ours, {**ours, "rollout": 3.0, "update": 2.0}), row("rollout", {"decode": 1.0}, {"decode": 2.0})
    assert phases([iteration, rollout, {**iteration, "metric": "memory"}, {**iteration, "theirs": None}]).splitlines()[2:] == [
        "| `iteration` | 1 / 3 = 3 | 2 / 2 = 1 | 1 / 1 = 1 | 4 / 2 = 0.5 |"
    ]


def test_only_what_is_between_the_markers_is_replaced() -> None:
    once = between_markers("# Title\n\nProse.\n", "old table")
    assert once.startswith("# Title\n\nProse.\n")
    twice = between_markers(once + "\nMore prose.\n", "new table")
    assert twice.startswith("# Title\n\nProse.\n")
    assert twice.endswith("\nMore prose.\n")
    assert "old table" not in twice
    assert between_markers(twice, "new table") == twice


def test_new_rows_take_the_places_of_old_ones() -> None:
    assert merged([{"name": "a", "x": 1}, {"name": "b", "x": 1}], [{"name": "c", "x": 2}, {"name": "a", "x": 2}]) == [
        {"name": "a", "x": 2},
        {"name": "b", "x": 1},
        {"name": "c", "x": 2},
    ]


def test_work_is_the_same_for_both_sides_and_within_its_limits() -> None:
    work = Work(model="", batch=50, prompt=20, response=30, k=2, vocabulary=2048)
    again = Work(**asdict(work))
    assert (work.prompts(), work.responses()) == (again.prompts(), again.responses())
    assert len(work.prompts()[0]) == 20
    assert all(10 <= len(prompt) <= 20 for prompt in work.prompts())
    assert all(4 <= length <= 30 for length in work.response_lengths())
    assert len(set(work.response_lengths())) > 5
    assert min(token for prompt in work.prompts() for token in prompt) >= 1000
    assert Work(model="", batch=4, response=40, lengths="spread").response_lengths() == [10, 20, 30, 40]
    assert Work(model="", batch=2, response=40, lengths="fixed").response_lengths() == [40, 40]


def test_a_ranking_of_k_is_all_its_pairs_better_first() -> None:
    work = Work(model="", batch=2, k=3, vocabulary=2048)
    (a, b, c), second = work.rankings()
    assert work.comparisons()[:3] == [(a, b), (a, c), (b, c)]
    assert len(work.comparisons()) == 6
    assert a[: len(work.prompts()[0])] == work.prompts()[0]
    assert second[0][: len(work.prompts()[1])] == work.prompts()[1]


def test_what_a_step_needs_is_counted_without_padding() -> None:
    work = Work(model="", batch=2, prompt=4, response=6, lengths="fixed")
    prompt, response = work.tokens()
    row = {"name": "sft_135m_ragged_fp32", "precision": "fp32", "work": asdict(work), "ours": {"seconds": 2.0, "parts": {}}}
    assert response == 12
    assert list(phases_of(row)) == [("step", 2.0, 6.0 * (TRUNK * (prompt + 12) + HEAD * 12), 0.0)]


@pytest.mark.parametrize(
    ("precision", "chosen", "expected"),
    [("fp32", True, False), ("bf16; peer fp32", False, True), ("auto; peer bf16", True, True), ("auto; peer bf16", False, False)],
)
def test_a_share_is_of_the_limit_of_the_precision_that_was_computed_in(precision: str, chosen: bool, expected: bool) -> None:
    assert in_bfloat16({"precision": precision, "kernels": {"bfloat16": chosen}}) == expected


def test_growth_is_told_over_the_first_point() -> None:
    rows = [{"ratio": value, "low": value, "high": 2 * value} for value in (0.5, 2.0)]
    assert relative(rows) == [{"ratio": 1.0, "low": 1.0, "high": 2.0}, {"ratio": 4.0, "low": 4.0, "high": 8.0}]


def test_the_page_and_the_figure_are_made_of_rows() -> None:
    row = {**result(GROUP.rows[0], GROUP, turns((1.0, 3.0)), {}), "versions": {"trl": "1.12.0"}}
    point = {
        "name": "growth_x_1", "curve": "growth_x", "axis": "things", "x": 1, "ratio": 1.0, "theirs": None, "must": None,
        "ours": {"seconds": 0.5, "peak_mb": 10},
    }  # fmt: skip
    rows = [row, point, {**point, "name": "growth_x_2", "x": 2}]
    machine = {"cpu": "A Processor", "family": "1/2/3", "flags": ["avx2"], "cores": 2, "memory_gb": 8.0, "threads": 2, "clock": "wall"}
    ways = itertools.product(("gemm", "gemm_decode"), ("fp32", "bf16"), ("gflops", "linear_gflops"))
    limits = {"_".join(way): 1.0 for way in ways}
    text = page({"machine": {**machine, "python": "3.11"}, "limits": {**limits, "copy_gbs": 1.0, "read_gbs": 1.0}, "rows": rows})
    assert "| `some_row` | 3 |" in text
    assert "trl 1.12.0" in text
    assert "| `growth_x_2` | 2 |" in text
    figure = growth_figure(rows)
    assert figure is not None
    assert figure.count("<svg") == 2
    assert growth_figure([row]) is None


def test_names_of_rows_are_theirs_alone() -> None:
    groups = [*real_groups("smollm2-135m"), *tiny_groups("tiny")]
    names = [row.name for group in groups for row in group.rows] + list(GROWTH)
    assert len(names) == len(set(names))
    for group in [*groups, *quick_groups("tiny")]:
        assert {side for row in group.rows for side in (row.side, row.peer) if side} == set(group.sides)


@contextmanager
def worker(folder: Path, task: str, work: Work, **options: Any) -> Iterator[Worker]:
    settings = {"task": task, "precision": "float32", "work": asdict(work), "threads": 1, "clock": "cpu", **options}
    running = Worker(Path(sys.executable), "benchmarks.bench_alignkit", settings, log=folder / "log", environment={"OMP_NUM_THREADS": "1"})
    try:
        yield running
    finally:
        running.stop()


def test_a_worker_does_a_step_when_it_is_told_to(tmp_path: Path) -> None:
    work = Work(model=str(tiny_folder()), batch=4, prompt=6, response=8, minibatches=2, epochs=2, vocabulary=260)
    with worker(tmp_path, "ppo", work) as running:
        assert running.facts()["peak_mb"] > 0
        first, second = running.step(check=True), running.step()
    assert first["tokens"] == second["tokens"] == sum(work.response_lengths())
    assert first["logprob_error"] <= 1e-4
    assert set(second["parts"]) == {"rollout", "scoring", "forward", "update"}


def test_a_worker_that_cannot_go_on_says_why(tmp_path: Path) -> None:
    with worker(tmp_path, "sft", Work(model="nowhere", batch=1)) as running, pytest.raises(WorkerError, match="nowhere"):
        running.step()
