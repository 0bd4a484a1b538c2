"""What people look at after a run: ``report.html``, tables for the terminal, and a picture of the learning curves."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import RunError
from alignkit.report import view
from alignkit.report.read import RunRecord, read_run
from alignkit.report.svg import STYLE, Frame, number

if TYPE_CHECKING:
    from rich.console import RenderableType

SHOWN_IN_TERMINAL = 3
"""Samples in the terminal; the report has them all."""


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into the run's folder: one file that needs nothing else. Raises ``RunError`` when there is no run."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("alignkit.report").joinpath("report.html.j2").read_text(encoding="utf-8"))
    path = run_dir / "report.html"
    path.write_text(template.render(_page(read_run(run_dir))), encoding="utf-8")
    return path


def summary_table(run_dir: Path) -> RenderableType:
    """The run in a terminal: before and after, a few samples side by side, and where the artifacts are."""
    from rich.console import Group

    run = read_run(run_dir)
    comparison = [_headline(run), _comparison_table(run), _samples_table(run)] if run.comparison else []
    return Group(*comparison, *(_text_loss_table(found) for found in view.text_losses(run)), _artifacts_table(run))


def write_curves(run_dir: Path, path: Path) -> Path:
    """Write an SVG picture of how reward, KL and response length went, for a README. Raises ``RunError`` when no stage drew rollouts."""
    run = read_run(run_dir)
    stages = [stage for stage in run.stages if view.REWARD in stage.metrics and view.KL in stage.metrics]
    if not stages:
        raise RunError(f"{run_dir}: no stage of this run has {view.REWARD} and {view.KL}; run a stage that learns from rollouts first")
    panels, frame = view.charts(stages[-1])[0][:3], Frame()
    drawn = "".join(_panel(panel, i * frame.width, frame) for i, panel in enumerate(panels))
    size = f'viewBox="0 0 {frame.width * len(panels)} {frame.height + 22}"'
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>{drawn}</svg>\n', encoding="utf-8")
    return path


def _panel(chart: view.Chart, left: int, frame: Frame) -> str:
    """A chart with its name above it, ``left`` pixels into a wider picture."""
    name = f"{chart.name}, {chart.unit}" if chart.unit else chart.name
    placed = chart.svg.replace("<svg ", f'<svg x="{left}" y="22" width="{frame.width}" height="{frame.height}" ', 1)
    return f'<text class="strong" x="{left + 48}" y="16" style="font-size:13px">{name}</text>{placed}'


def _page(run: RunRecord) -> dict[str, Any]:
    """All that the template shows."""
    comparison, config = run.comparison, run.about["config"]
    curves = [(stage, *view.charts(stage, run.warnings)) for stage in run.stages if stage.metrics]
    frontiers = [(stage.name, drawn) for stage in run.stages if (drawn := view.frontier(stage)) is not None]
    finished = {stage.name: stage.manifest.get("seconds") for stage in run.stages if stage.manifest}
    return {
        "run": run,
        "model": config.get("policy", {}).get("model") or config.get("policy", {}).get("kind", "unknown model"),
        "planned": [stage["name"] for stage in config.get("stages", ())],
        "finished": finished,
        "seconds": sum(seconds or 0.0 for seconds in finished.values()),
        "comparison": comparison,
        "win_rate_bar": view.win_rate_bar(comparison),
        "gain_bar": view.gain_bar(comparison),
        "changes": view.changes(comparison),
        "frontiers": frontiers,
        "curves": curves,
        "text_losses": view.text_losses(run),
        "other_figures": view.other_figures(run),
        "data_counts": view.data_counts(run.stages),
        "artifacts": [stage for stage in run.stages if stage.artifact],
        "config": json.dumps(config, indent=2, ensure_ascii=False),
        "svg_style": STYLE,
        "number": number,
        "percent": view.percent,
        "duration": view.duration,
    }


def _headline(run: RunRecord) -> RenderableType:
    from rich.text import Text

    found = run.comparison
    win, low, high = (view.percent(found[key]) for key in ("win_rate", "ci95_low", "ci95_high"))
    return Text.assemble(
        (f"{found['candidate']} beats {found['baseline']} on {win}", "bold"),
        f" of {found['prompts']} held-out prompts (95% interval {low} to {high}); judge: {found['judge']}",
    )


def _comparison_table(run: RunRecord) -> RenderableType:
    from rich.table import Table

    found = run.comparison
    table = Table()
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    for row in view.changes(found):
        table.add_row(row.name, row.before, row.after)
    table.add_row("KL per response, nats", "0", number(found["kl_sequence_nats"]))
    return table


def _text_loss_table(found: view.TextLosses) -> RenderableType:
    from rich.table import Table

    table = Table(title=f"{found.name}: held-out text, {found.text}", title_justify="left", title_style="bold")
    for column in ("policy", "loss", f"difference to {found.rows[0][0]} (95% interval)"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for row in found.rows:
        table.add_row(*row)
    return table


def _samples_table(run: RunRecord) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="the first held-out prompts, before and after", title_justify="left", title_style="bold", show_lines=True)
    for column in ("prompt", "before", "after"):
        table.add_column(column, ratio=1 if column == "prompt" else 2, overflow="fold")
    for example in run.comparison.get("examples", ())[:SHOWN_IN_TERMINAL]:
        table.add_row(*(Text(str(example[key]).strip()) for key in ("prompt", "before", "after")))
    return table


def _artifacts_table(run: RunRecord) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="artifacts", title_justify="left", title_style="bold")
    for column in ("stage", "what", "folder", "took"):
        table.add_column(column, overflow="fold")
    for stage in run.stages:
        if stage.artifact:
            took = view.duration(stage.manifest.get("seconds"))
            table.add_row(stage.name, str(stage.manifest["makes"]).replace("_", " "), Text(str(stage.artifact)), took)
    return table
