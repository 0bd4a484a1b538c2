"""Where figures go: ``metrics.jsonl``, ``events.jsonl`` and the terminal. Torch-free."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignkit.types import Metrics

_PLAIN_SECONDS = 10.0  # between two lines of progress where there is no terminal to draw a bar on


class MetricsFile:
    """One JSON line a step. Wall-clock figures stand under ``time/``; all others are the same in a run done again."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def log(self, stage: str, step: int, metrics: Metrics) -> None:
        """Append a step. A figure that is not finite is written as null: JSON has no NaN, and 0 would be a lie."""
        line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with self._path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")

    def cut(self, step: int) -> None:
        """Forget what came after ``step``, and a last line that a kill left unfinished: those steps will be done again."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except ValueError:
                continue
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(self._path)


class EventLog:
    """What happened to a run, append-only."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, kind: str, **values: Any) -> None:
        """One line, with the time in UTC."""
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": kind, **values}
        with self._path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line, ensure_ascii=False) + "\n")


class StageProgress:
    """The progress of one stage; made by ``Terminal.stage``."""

    def __init__(self, name: str, total: int, headline: Sequence[str], bar: Any) -> None:
        self._name, self._total, self._headline, self._bar = name, total, headline, bar
        self._said = time.monotonic()

    def advance(self, step: int, metrics: Metrics) -> None:
        """Show that ``step`` steps are done, and the figures that matter."""
        figures = "  ".join(f"{_short(name)} {metrics[name]:.3g}" for name in self._headline if name in metrics)
        held_out = "  ".join(f"{_short(name)} {value:.3g}" for name, value in metrics.items() if name.startswith("validation/"))
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, figures=figures)
        elif step == self._total or time.monotonic() - self._said > _PLAIN_SECONDS:
            self._said = time.monotonic()
            print(f"{self._name}  {step}/{self._total}  {figures}", flush=True)
        if held_out:
            text = f"{self._name}: held out after step {step}: {held_out}"
            self._bar.console.print(text, highlight=False) if self._bar is not None else print(text, flush=True)


class Terminal:
    """The person watching: a bar a stage on a terminal, a line every few seconds elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False)
        self._bar: Any = None

    def say(self, text: str) -> None:
        """One line."""
        (self._bar.console if self._bar is not None else self._console).print(text, markup=False, soft_wrap=True)

    def show(self, renderable: Any) -> None:
        """A table, or anything that rich can draw."""
        self._console.print(renderable)

    @contextmanager
    def stage(self, name: str, total: int, done: int, *, headline: Sequence[str]) -> Iterator[StageProgress]:
        """Progress of ``total`` steps of which ``done`` are behind; ``headline`` names the metrics to show."""
        if not self._console.is_terminal:
            yield StageProgress(name, total, headline, None)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("[bold]{task.description:<8}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console) as bar:
            self._bar = bar
            bar.add_task(name, total=total, completed=done, figures="")
            try:
                yield StageProgress(name, total, headline, bar)
            finally:
                self._bar = None


def quiet_libraries() -> None:
    """Keep other libraries' progress bars and advice out of the run's output; their errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module=r"(transformers|peft|datasets|torch|huggingface_hub)(\..*)?")
    for name in ("transformers", "datasets", "huggingface_hub", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if "transformers" in sys.modules:
        sys.modules["transformers"].logging.disable_progress_bar()


def _short(name: str) -> str:
    """``kl/sequence_nats`` as a person says it: kl."""
    known: Mapping[str, str] = {
        "loss/nll_nats": "loss",
        "loss/ranking_nats": "loss",
        "reward/score_mean": "reward",
        "kl/sequence_nats": "kl",
        "response/length_tokens": "length",
        "policy/entropy_nats": "entropy",
        "validation/loss_nll_nats": "loss",
        "validation/loss_ranking_nats": "loss",
    }
    return known.get(name, name.rpartition("/")[2])
