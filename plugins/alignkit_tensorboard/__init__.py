"""Metrics in TensorBoard: ``tensorboard --logdir runs/NAME`` shows them while the run runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.api import Metrics, RunError, SettingError, TrackerSpec, hookimpl, setting


@dataclass(frozen=True, kw_only=True)
class TensorBoardConfig:
    """Where the event files go."""

    folder: str = setting("tensorboard", "where event files are written; a relative path is inside the run's folder")

    def __post_init__(self) -> None:
        if not self.folder.strip():
            raise SettingError("folder", 'is empty; give a folder, such as "tensorboard"')


class TensorBoardTracker:
    """Writes each figure as the scalar ``stage/area/name``, whose first word TensorBoard makes a section of.

    Each stage has a folder of its own. What a stage does again, because it was resumed or sent back, replaces what it had written, and
    TensorBoard replaces by step alone: in one folder it would take the same steps of other stages along.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RunError(
                "kind tensorboard needs the package tensorboard, which is not installed; "
                'run: pip install "alignkit[tensorboard]"  (or: pip install tensorboard)'
            ) from error
        self._open: Any = SummaryWriter
        self._folder = folder
        self._writers: dict[str, Any] = {}
        self._last: dict[str, int] = {}
        self._report_failure = threading.excepthook
        threading.excepthook = self._thread_failed

    def log(self, stage: str, step: int, metrics: Metrics) -> None:
        """Write the figures of one step; they are in the file on return. Raises ``RunError`` when the disk refuses."""
        with self._explained():
            if step <= self._last.get(stage, step):
                self._begin(stage, step)
            self._last[stage] = step
            for name, value in metrics.items():
                self._writers[stage].add_scalar(f"{stage}/{name}", value, step)
            self._writers[stage].flush()

    def _begin(self, stage: str, step: int) -> None:
        """A file that takes the place of what the stage's others hold of ``step`` and later."""
        if stage in self._writers:
            self._writers[stage].close()
        self._writers[stage] = self._open(str(self._folder / stage), purge_step=step)

    def close(self) -> None:
        """Let the files go. Raises ``RunError`` when the disk refuses."""
        threading.excepthook = self._report_failure
        with self._explained():
            for writer in self._writers.values():
                writer.close()

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        # The thread that writes for TensorBoard ends with what the disk said, and the next call raises it: once is enough.
        if not type(failure.thread).__module__.startswith("tensorboard."):
            self._report_failure(failure)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self._folder} cannot be written: {error.strerror or error}; repair this and run the same command again, "
                "or leave the tracker out"
            ) from error


def _build(config: TensorBoardConfig, folder: Path) -> TensorBoardTracker:
    return TensorBoardTracker(folder / config.folder)


@hookimpl
def register_trackers() -> list[TrackerSpec]:
    """``tensorboard``."""
    return [
        TrackerSpec(
            kind="tensorboard",
            summary="scalars for TensorBoard, named stage/area/name",
            config=TensorBoardConfig,
            build=_build,
        )
    ]
