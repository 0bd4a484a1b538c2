"""Where figures go: ``metrics.jsonl``, ``events.jsonl`` and the terminal. Torch-free."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import SaveError
from alignkit.files import explained, sync_file, write_text
from alignkit.types import Metrics

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_PLAIN_SECONDS = 10.0  # at most this between two lines of progress, where there is no terminal to draw a bar on
_PLAIN_LINES = 10  # at least this many a stage
_NOISY = ("transformers", "datasets", "huggingface_hub", "peft")
_QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",  # reading GGUF asks none of the others
}
_SHORT = {
    "loss/nll_nats": "loss",
    "loss/ranking_nats": "loss",
    "reward/score_mean": "reward",
    "kl/sequence_nats": "kl",
    "response/length_tokens": "length",
    "policy/entropy_nats": "entropy",
}
"""What a person calls a metric; any other goes by its own name without its area."""


class MetricsFile:
    """One JSON line a step. Wall-clock figures stand under ``time/``; all others are the same in a run done again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting = ""

    def log(self, stage: str, step: int, metrics: Metrics) -> None:
        """Append a step; a figure that is not finite is null. What the disk refuses waits for the next step, or for ``sync``."""
        self._waiting += _line({"step": step, **metrics})
        with suppress(SaveError):
            self._write()

    def sync(self) -> None:
        """Wait until every step is on the disk. Raises ``SaveError`` when it refuses."""
        self._write()
        with explained(f"{self._path} cannot be written", SaveError, remedy=""):
            sync_file(self._path)

    def _write(self) -> None:
        with explained(f"{self._path} cannot be written", SaveError, remedy=""):
            _append(self._path, self._waiting)
        self._waiting = ""

    def cut(self, step: int) -> None:
        """Forget what came after ``step``, and a line that a kill left unfinished: those steps will be done again.

        Raises ``SaveError`` when the disk refuses.
        """
        if not self._path.exists():
            return
        with explained(f"{self._path} cannot be cut back to step {step}", SaveError, remedy=""):
            lines = self._path.read_text(encoding="utf-8", errors="replace").split("\n")
            write_text(self._path, "".join(line + "\n" for line in lines if 0 < _step(line) <= step))


class EventLog:
    """What happened to a run, append-only."""

    def __init__(self, path: Path) -> None:
        self._path = path
        if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
            # A kill left half a line, which the next one would be glued to.
            os.truncate(path, content.rfind(b"\n") + 1)

    def append(self, kind: str, **values: Any) -> None:
        """One line, with the time in UTC. Raises ``SaveError`` when the disk refuses."""
        line = _line({"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": kind, **values})
        with explained(f"{self._path} cannot be written", SaveError, remedy=""):
            _append(self._path, line)


class StageProgress:
    """The progress of one stage; made by ``Terminal.stage``."""

    def __init__(
        self, name: str, total: int, done: int, *, headline: Sequence[str], say: Callable[[str], None], bar: Progress | None
    ) -> None:
        self._name, self._total, self._first, self._headline = name, total, done, headline
        self._say, self._bar = say, bar
        self._started = self._said = time.monotonic()
        self._tenth = self._tenth_of(done)

    def advance(self, step: int, metrics: Metrics) -> None:
        """Show that ``step`` steps are done, the figures that matter, and those of held-out rows when there are any."""
        figures = "  ".join(f"{_short(name)} {_figure(metrics[name])}" for name in self._headline if name in metrics)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, figures=figures)
        elif self._is_due(step):
            self._said, self._tenth = time.monotonic(), self._tenth_of(step)
            self._say("  ".join(part for part in (self._name, f"{step}/{self._total}", figures, self._left(step)) if part))
        # `validation/reward_accuracy` is `reward/accuracy` on held-out rows.
        held_out = {
            name.removeprefix("validation/").replace("_", "/", 1): metrics[name] for name in metrics if name.startswith("validation/")
        }
        if held_out:
            shown = "  ".join(f"{_short(name)} {_figure(value)}" for name, value in held_out.items())
            self._say(f"{self._name}: held out after step {step}: {shown}")

    def say(self, text: str) -> None:
        """One line, above the bar."""
        self._say(text)

    def _is_due(self, step: int) -> bool:
        return step == self._total or self._tenth_of(step) > self._tenth or time.monotonic() - self._said >= _PLAIN_SECONDS

    def _tenth_of(self, step: int) -> int:
        return _PLAIN_LINES * step // self._total

    def _left(self, step: int) -> str:
        seconds = round((time.monotonic() - self._started) / max(1, step - self._first) * (self._total - step))
        minutes = (
            f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}" if seconds >= 3600 else f"{seconds // 60}:{seconds % 60:02}"
        )
        return f"({minutes} left)" if step < self._total else ""


class Terminal:
    """The person watching: a bar a stage on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console

        self._console = console or Console(highlight=False)

    def say(self, text: str) -> None:
        """One line, as it stands; above the bar while there is one."""
        self._console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def show(self, renderable: Any) -> None:
        """A table, or anything that rich can draw."""
        self._console.print(renderable)

    @contextmanager
    def stage(self, name: str, total: int, done: int, *, headline: Sequence[str]) -> Iterator[StageProgress]:
        """Progress of ``total`` steps of which ``done`` are behind; ``headline`` names the metrics to show."""
        if not self._console.is_interactive:
            yield StageProgress(name, total, done, headline=headline, say=self.say, bar=None)
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
        # Drawn rarely: the cores have work to do.
        with Progress(*columns, console=self._console, refresh_per_second=2) as bar:
            bar.add_task(name, total=total, completed=done, figures="")
            yield StageProgress(name, total, done, headline=headline, say=self.say, bar=bar)


def quiet_libraries() -> None:
    """Keep other libraries' progress bars and advice out of the run's output; their errors still come through.

    What the user has set in the environment stays as it is.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", module=rf"({'|'.join(_NOISY)}|torch)(\..*)?$")
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    # They read the environment when they are imported, which in a notebook was long ago.
    if "transformers" in sys.modules:
        sys.modules["transformers"].logging.disable_progress_bar()
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()


def _line(values: Mapping[str, Any]) -> str:
    # JSON has no NaN, and 0 would be a lie.
    finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()}
    return json.dumps(finite, ensure_ascii=False) + "\n"


def _append(path: Path, text: str) -> None:
    """All of ``text`` or nothing: a full disk takes half a line. Raises ``OSError``."""
    rest = text.encode("utf-8", errors="backslashreplace")
    with path.open("ab", buffering=0) as handle:
        end = handle.tell()
        try:
            while rest:
                rest = rest[handle.write(rest) :]
        except OSError:
            handle.truncate(end)
            raise


def _step(line: str) -> int:
    """The step that a line is about; 0 where it is not whole."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0


def _short(name: str) -> str:
    return _SHORT.get(name, name.rpartition("/")[2])


def _figure(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 or not math.isfinite(value) else f"{value:,.0f}"
