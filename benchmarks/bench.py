"""How fast is alignkit? The same work for it and for its peers, turn by turn, and what the machine could do at most.

    make bench          everything: the 135M model and a tiny one, wall time; writes benchmarks/results.json and docs/performance.md
    make bench-quick    the tiny model, one thread, process CPU time; writes nothing unless told (--out)

    python -m benchmarks.bench [--rows NAME ...] [--pairs N] [--threads N] [--peer-ppo PYTHON] [--peer-new PYTHON] [--levers]

Peers run in environments of their own, made in benchmarks/.peers on the first call unless existing ones are named. Of the workers of a
row one computes at a time. It ends with 1 when the sides did not do equally much, or when alignkit's figures are not exact.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.bench_growth import GROWTH, growth_figure, measure_growth
from benchmarks.bench_machine import describe, limits
from benchmarks.bench_page import page, with_a_peer
from benchmarks.bench_pipe import ROOT, Worker, WorkerError
from benchmarks.bench_rows import Group, Side, lever_groups, quick_groups, real_groups, tiny_groups
from benchmarks.bench_setup import peer_python, random_model, real_model
from benchmarks.bench_table import Answer, Result, between_markers, inexact, merged, ratios, result, unequal

HERE = Path(__file__).resolve().parent
RESULTS, PAGE, FIGURE = HERE / "results.json", ROOT / "docs" / "performance.md", ROOT / "docs" / "growth.svg"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """How everything is run."""

    home: Path
    pythons: Mapping[str, Path]
    threads: int
    clock: str

    def worker(self, side: Side, work: Mapping[str, Any]) -> Worker:
        """A process for one side; it loads while nobody measures."""
        logs = self.home / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"{len(list(logs.iterdir())):04d}-{side.module.rpartition('.')[2]}.log"
        settings = {"work": work, "threads": self.threads, "clock": self.clock, "label": side.label, **side.options}
        variables = {"OMP_NUM_THREADS": str(self.threads), **side.variables}
        return Worker(self.pythons[side.python], side.module, settings, log=log, environment=variables)


def main() -> None:
    told = arguments()
    home = told.home.resolve()
    for old in (home / "logs").glob("*.log"):
        old.unlink()
    threads = 1 if told.quick else told.threads
    pythons = {
        "ours": Path(sys.executable),
        "ppo": told.peer_ppo or peer_python("ppo", home),
        "new": told.peer_new or peer_python("new", home),
    }
    bench = Bench(home=home, pythons=pythons, threads=threads, clock="cpu" if told.quick else "wall")
    groups = choose(told, home / "models")
    growing = [name for name in GROWTH if (name in told.rows if told.rows else not told.quick and not told.levers)]

    begin, written = time.time(), Written(bench, told)
    for group in groups:
        written.add(*run(bench, group, told.pairs))
    for name in growing:
        written.add(*guarded(name, lambda name=name: measure_growth(name, bench, home / "models")))
    print(f"\n{ratios(with_a_peer(written.rows))}\n{time.time() - begin:.0f} s in all")
    for complaint in written.complaints:
        print(f"FAILED: {complaint}")
    sys.exit(1 if written.complaints else 0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the tiny model alone, one thread, process CPU time")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="these rows alone; they are merged into the others' results")
    parser.add_argument("--levers", action="store_true", help="alignkit against itself, each lever on and off, and nothing else")
    parser.add_argument("--pairs", type=int, help="turns of each row, instead of its own number")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peer-ppo", type=Path, metavar="PYTHON", help="an environment with trl 1.12.0")
    parser.add_argument("--peer-new", type=Path, metavar="PYTHON", help="an environment with the newest trl")
    parser.add_argument("--home", type=Path, default=HERE / ".peers", help="where environments, models and logs are put")
    parser.add_argument("--out", type=Path, help="where results are written (benchmarks/results.json; with --quick: nowhere)")
    parser.add_argument("--no-page", action="store_true", help="leave docs/ alone")
    return parser.parse_args()


def choose(told: argparse.Namespace, models: Path) -> list[Group]:
    """The groups of the rows that were asked for, with those rows alone."""
    tiny = str(random_model(models))
    if told.quick:
        groups = quick_groups(tiny)
    else:
        real = str(real_model(models))
        groups = lever_groups(real) if told.levers else [*real_groups(real), *tiny_groups(tiny)]
    known = {row.name for group in groups for row in group.rows} | (set() if told.quick else set(GROWTH))
    if unknown := sorted(set(told.rows or ()) - known):
        sys.exit(f"no such row: {', '.join(unknown)}; there are: {', '.join(sorted(known))}")
    if not told.rows:
        return groups
    kept = [replace(group, rows=tuple(row for row in group.rows if row.name in told.rows)) for group in groups]
    return [group for group in kept if group.rows]


def run(bench: Bench, group: Group, pairs: int | None) -> tuple[list[Result], list[str]]:
    """The rows of a group, and what is wrong with them."""
    names = ", ".join(row.name for row in group.rows)
    wanted = {side for row in group.rows for side in (row.side, row.peer) if side}
    group = replace(group, sides={name: side for name, side in group.sides.items() if name in wanted})
    group = replace(group, checked=tuple(name for name in group.checked if name in wanted))

    def measured() -> tuple[list[Result], list[str]]:
        first, turns = (fresh_turns if group.fresh else turns_of)(bench, group, pairs or group.pairs)
        work = {**asdict(group.work), "model": Path(group.work.model).name}
        rows = [{**result(row, group, turns, first), "work": work, **versions(first)} for row in group.rows]
        return rows, unequal(group, turns) + inexact(group, first)

    return guarded(names, measured)


def guarded(names: str, measured: Any) -> tuple[list[Result], list[str]]:
    """A row that cannot be measured does not take the others with it."""
    begin = time.time()
    print(f"{names} ...", flush=True)
    try:
        rows, complaints = measured()
    except WorkerError as error:
        return [], [f"{names}: {error}"]
    for row in rows:
        print(f"  {row['name']}: {row['ratio']:.3g} ({row['low']:.3g} to {row['high']:.3g}), {row['metric']}")
    print(f"  {time.time() - begin:.0f} s", flush=True)
    return rows, complaints


def turns_of(bench: Bench, group: Group, pairs: int) -> tuple[Mapping[str, Answer], list[dict[str, Answer]]]:
    """A warm-up, then ``pairs`` turns in which each side does one step."""
    work = asdict(group.work)
    with ExitStack() as stack:
        workers = {}
        for name, side in group.sides.items():
            workers[name] = bench.worker(side, work)
            stack.callback(workers[name].stop)
            workers[name].facts()
        first = {name: worker.step(**({"check": True} if name in group.checked else {})) for name, worker in workers.items()}
        return first, [{name: worker.step() for name, worker in workers.items()} for _ in range(pairs)]


def fresh_turns(bench: Bench, group: Group, pairs: int) -> tuple[Mapping[str, Answer], list[dict[str, Answer]]]:
    """``pairs`` turns, each in new processes: a peak is that of one step."""
    work, turns = asdict(group.work), []
    for _ in range(pairs):
        turn: dict[str, Answer] = {}
        for name, side in group.sides.items():
            worker = bench.worker(side, work)
            try:
                turn[name] = worker.step()
            finally:
                worker.stop()
        turns.append(turn)
    return turns[0], turns


def versions(answers: Mapping[str, Answer]) -> dict[str, Any]:
    """Of the libraries that took part, and what alignkit found to be fastest."""
    libraries = {library: version for answer in answers.values() for library, version in answer.get("versions", {}).items()}
    kernels = next((answer["kernels"] for answer in answers.values() if "kernels" in answer), None)
    return {"versions": libraries, "kernels": kernels}


class Written:
    """Rows so far; the files hold them from the moment they are known."""

    def __init__(self, bench: Bench, told: argparse.Namespace) -> None:
        self.rows: list[Result] = []
        self.complaints: list[str] = []
        self._out = told.out or (None if told.quick else RESULTS)
        self._page = not (told.quick or told.no_page)
        self._head = {"machine": describe(bench.threads, bench.clock), "limits": limits(bench.threads, bench.clock)}
        print(json.dumps(self._head), flush=True)
        self._old: list[Result] = []
        if (told.rows or told.levers) and self._out and self._out.is_file():
            before = json.loads(self._out.read_text())
            if before["machine"] == self._head["machine"]:
                self._old = before["rows"]
                # A limit is what the machine can do, not what it did in its worst minute.
                self._head["limits"] = {name: max(rate, before["limits"].get(name, 0.0)) for name, rate in self._head["limits"].items()}
            else:
                print("the results that are there are another machine's: they are left out", flush=True)

    def add(self, rows: Sequence[Result], complaints: Sequence[str]) -> None:
        """Keep and write."""
        self.rows += rows
        self.complaints += complaints
        everything: dict[str, Any] = {**self._head, "rows": merged(self._old, self.rows)}
        if self._out:
            self._out.write_text(json.dumps(everything, indent=1) + "\n")
        if self._page:
            text = PAGE.read_text() if PAGE.is_file() else ""
            PAGE.write_text(between_markers(text, page(everything)))
            if figure := growth_figure(everything["rows"]):
                FIGURE.write_text(figure)


if __name__ == "__main__":
    main()
