"""Runs the stages of a config in order, each once: a finished stage is skipped, an interrupted one goes on from its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from alignkit.config import LoadedConfig, load_config
from alignkit.errors import AlignkitError, Interrupted, SaveError
from alignkit.folder import choices_of, claim, locked, set_aside
from alignkit.interrupt import stop_on_signal
from alignkit.memory import keep_freed_memory
from alignkit.registry import Registry, find_plugins
from alignkit.threads import wait_briefly
from alignkit.tracking import EventLog, Terminal, quiet_libraries
from alignkit.world import Changes


def run_config(config: str | Path, overrides: Sequence[str] = (), *, fresh: bool = False, accept_changes: bool = False) -> Path:
    """Run or continue what ``config`` describes; returns the run's folder.

    ``fresh`` moves an earlier run in the folder aside and starts anew; ``accept_changes`` goes on with a run although config, data, chat
    template or plugins are not what they were. Raises ``AlignkitError`` for what the caller can repair, ``Interrupted`` when a signal
    stopped it after its state was saved.
    """
    wait_briefly()
    keep_freed_memory()
    quiet_libraries()
    registry = find_plugins()
    loaded = load_config(config, overrides, registry)
    folder = Path(loaded.run.dir)
    terminal = Terminal()
    if fresh and folder.exists():
        with locked(folder):  # not from under another process
            aside = set_aside(folder)
        terminal.say(f"the earlier run was moved to {aside}")
    with locked(folder):
        _run(loaded, registry, folder, terminal, accept_changes)
    return folder


def _run(loaded: LoadedConfig, registry: Registry, folder: Path, terminal: Terminal, accept_changes: bool) -> None:
    import torch

    from alignkit.models import kernels
    from alignkit.models.causal_lm import pick_device
    from alignkit.report import summary_table, write_report
    from alignkit.stage import StageRunner

    run = loaded.run
    if run.threads:
        torch.set_num_threads(run.threads)
    device = str(pick_device())
    # Another way of multiplying would round differently: a run goes on with the one it began with, where it goes on on the same device.
    before = choices_of(folder)
    if before.get("device") == device and "kernels" in before:
        kernels.use(kernels.again(before["kernels"]))
    else:
        kernels.use(kernels.plain() if run.kernels == "plain" else kernels.probe())
    choices = {
        "threads": torch.get_num_threads(),
        "device": device,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "kernels": asdict(kernels.chosen()),
    }
    events = EventLog(folder / "events.jsonl")
    changes = Changes(accept_changes, terminal.say, events)
    claim(folder, loaded, registry, choices, changes)
    trackers = [registry.tracker(chosen.kind).build(chosen.config, folder) for chosen in run.trackers]
    with stop_on_signal(terminal.say) as stop:
        stages = StageRunner(run, registry, folder, terminal, events, trackers, stop, changes)
        try:
            for stage in run.stages:
                stages.run(stage)
                stop.check(f"stage {stage.name} is finished")
        except Interrupted:
            raise
        except AlignkitError as error:
            # On a full disk the event cannot be written either; the first error is the one to show.
            with suppress(SaveError):
                events.append("failed", error=str(error))
            raise
        finally:
            for tracker in trackers:
                tracker.close()
    report = write_report(folder)
    terminal.show(summary_table(folder))
    terminal.say(f"report: {report}")
