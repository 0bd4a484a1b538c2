"""``alignkit export`` and ``alignkit quarantine``. Light: what is heavy is imported when a command runs."""

from __future__ import annotations

import getpass
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from alignkit_serve.dataset.filters import FORMS, JUDGING, NAME, SHAPES, SPLITS, Filters, Shape, Split
from alignkit_serve.options import store_option

_DEFAULT = Filters()
F = TypeVar("F", bound=Callable[..., Any])


def export_command() -> click.Command:
    """``alignkit export``."""
    return export


def quarantine_command() -> click.Command:
    """``alignkit quarantine``."""
    return quarantine


def _name(context: click.Context, parameter: click.Parameter, value: str) -> str:
    if not re.fullmatch(NAME, value):
        raise click.BadParameter("up to 64 letters, digits, dots, dashes and underscores are allowed")
    return value


def _filter(name: str, kind: Any) -> Callable[[F], F]:
    """The option of a filter, with its default and its meaning as they are in a config."""
    field = Filters.__dataclass_fields__[name]
    return click.option(
        f"--{name.replace('_', '-')}", type=kind, default=getattr(_DEFAULT, name), show_default=True, help=f"{field.metadata['doc']}."
    )


@click.command()
@click.argument("name", callback=_name)
@click.option("--shape", type=click.Choice(SHAPES), required=True, help="What its rows are.")
@click.option("--split", type=click.Choice(SPLITS), default="train", show_default=True)
@click.option(
    "--folder", type=click.Path(path_type=Path, file_okay=False), default="exports", show_default=True, help="Where it is written."
)
@store_option
@_filter("since", str)
@_filter("until", str)
@click.option("--kind", "kinds", multiple=True, type=click.Choice(JUDGING), help="Only this kind of feedback; may be given again.")
@click.option("--policy", "policies", multiple=True, help="Only answers of this policy; may be given again.")
@_filter("form", click.Choice(FORMS))
@_filter("of", click.Choice(["judged", "all"]))
@_filter("probation", click.IntRange(min=0))
@_filter("annotator_share", click.FloatRange(0, 1, min_open=True))
@_filter("key_share", click.FloatRange(0, 1, min_open=True))
@_filter("rating_gap", click.IntRange(0, 6))
@_filter("dead_band", click.FloatRange(0, 6))
@_filter("burst", click.IntRange(min=0))
def export(name: str, shape: Shape, split: Split, folder: Path, store: str, **filters: Any) -> None:
    """Make what people said into data, under a name.

    What is there under NAME stays as it is. The folder that is printed holds rows.parquet and manifest.json.
    """
    from alignkit_serve.exporting import Wanted, obtain
    from alignkit_serve.store import Store

    wanted = Wanted(name=name, shape=shape, split=split, filters=Filters(**filters))
    with Store.open(store) as opened:
        made, _ = obtain(opened, wanted, folder)
    counts = made.counts
    table = [
        ("rows", made.n_rows),
        ("feedback in them", counts["feedback"]["kept"]),
        *((f"left out: {reason}", count) for reason, count in counts["feedback"]["dropped"].items()),
        *((f"rows cut: {bound}", count) for bound, count in counts["cut"].items() if count),
        ("annotators disagree", len(counts["disputes"])),
    ]
    for what, count in table:
        click.echo(f"{what:<32} {count:>8}")
    click.echo(made.path)


@click.command()
@click.argument("ids", nargs=-1, required=True)
@click.option("--reason", help="Why.")
@click.option("--release", is_flag=True, help="Take it out of quarantine again.")
@store_option
def quarantine(ids: tuple[str, ...], reason: str | None, release: bool, store: str) -> None:
    """Keep feedback out of all exports to come; nothing is deleted.

    An export's manifest lists the ids of what looked suspect.
    """
    from alignkit_serve.store import Store, judged

    if release == (reason is not None):
        raise click.UsageError("give either --reason or --release")
    operator = f"operator {getpass.getuser()}"

    def change(connection: Any) -> int:
        if release:
            return judged.release(connection, ids, operator)
        return judged.quarantine(connection, dict.fromkeys(ids, reason or ""), operator)

    with Store.open(store) as opened:
        count = opened.write(change).result()
    click.echo(f"{count} of {len(set(ids))} {'released' if release else 'in quarantine now'}")
