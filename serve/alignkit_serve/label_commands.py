"""``alignkit label``: what is to be ranked by people, and how they get on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from alignkit_serve.options import key_option, url_option

if TYPE_CHECKING:
    from alignkit_serve.label_making import Maker, Tally

_overlap = click.option("--overlap", type=click.IntRange(1, 100), default=1, show_default=True, help="How many people rank each.")
_file = click.Path(path_type=Path, dir_okay=False, exists=True)


def label_command() -> click.Command:
    """``alignkit label``."""
    return label


@click.group()
def label() -> None:
    """What people are to rank, and how they get on."""


@label.command()
@click.argument("prompts", metavar="PROMPTS.jsonl", type=_file)
@click.option("--policy", "policies", multiple=True, default=("live",), show_default=True, help="Whose answers; several: split evenly.")
@click.option("--answers", type=click.IntRange(2, 9), default=4, show_default=True, help="To each prompt, of all policies together.")
@_overlap
@click.option("--temperature", type=click.FloatRange(0, 2), default=1.0, show_default=True)
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@url_option
@key_option
def make(
    prompts: Path,
    policies: tuple[str, ...],
    answers: int,
    overlap: int,
    temperature: float,
    max_tokens: int,
    url: str,
    key: str | None,
) -> None:
    """Sample answers to prompts, and let people rank them.

    Stopped and run again it goes on: a prompt that has a task for the same policies and settings is left as it is.
    """
    from alignkit_serve.label_making import Recipe, read_prompts

    asked = read_prompts(prompts)

    async def work(maker: Maker) -> Tally:
        names = await maker.policies(policies)
        if answers < len(names):
            raise click.UsageError(f"--answers {answers} are too few for {len(names)} policies; each gives one at least")
        recipe = Recipe(policies=names, answers=answers, temperature=temperature, max_tokens=max_tokens)
        return await maker.sample(asked, recipe, overlap=overlap)

    _run(url, key, work)


@label.command("import")
@click.argument("file", metavar="FILE.jsonl", type=_file)
@_overlap
@url_option
@key_option
def bring(file: Path, overlap: int, url: str, key: str | None) -> None:
    """Let people rank answers from elsewhere.

    A row has a prompt and its responses. Where it has ranks too, they are gold: people are measured by them.
    """
    from alignkit_serve.label_making import read_rankings

    rankings = read_rankings(file)
    _run(url, key, lambda maker: maker.bring(rankings, overlap=overlap))


@label.command()
@click.option(
    "--origin",
    "origins",
    multiple=True,
    type=click.Choice(["ab", "shadow", "n"]),
    default=("ab", "shadow"),
    show_default=True,
    help="Pairs of policies, shown or kept aside, or several answers of one.",
)
@_overlap
@click.option("--limit", type=click.IntRange(1, 1000), default=100, show_default=True, help="The oldest so many.")
@url_option
@key_option
def collect(origins: tuple[str, ...], overlap: int, limit: int, url: str, key: str | None) -> None:
    """Let people rank what traffic left to be compared.

    Only what its users gave for training, and what nobody was asked about yet.
    """
    from alignkit_serve.client import Client

    click.echo(f"{len(Client(url, key).collect_tasks(origins, overlap, limit))} tasks made")


@label.command()
@url_option
@key_option
def status(url: str, key: str | None) -> None:
    """How far the tasks are, and how far people agree."""
    from alignkit_serve.client import Client

    found = Client(url, key).agreement()
    progress = found["progress"]
    for name in ("tasks", "assignments"):
        counts = ", ".join(f"{count} {state}" for state, count in sorted(progress[name].items()))
        click.echo(f"{name:<22} {counts or 'none'}")
    for name, title in _FIGURES.items():
        click.echo(f"{title:<22} {_figure(found[name])}")
    for page in found["position_bias"]:
        often = f"{page['first']} of {page['of']}, by chance {page['expected']:.1f}, p = {page['p']:.2g}"
        click.echo(f"{'first shown, first':<22} {often} ({page['page']})")
    for one in found["annotators"]:
        shares = "  ".join(f"{name} {_share(one[name])}" for name in ("agreement", "gold", "ties"))
        click.echo(f"{one['id']}  {one['rankings']} rankings  {shares}")


_FIGURES = {
    "agreement": "agreement on pairs",
    "alpha_pairs": "alpha, pairs",
    "alpha_ratings": "alpha, ratings",
    "tau": "Kendall's tau-b",
}


def _figure(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "too few"
    return f"{figure['value']:.3f} ± {figure['error']:.3f}, 95 % {figure['low']:.3f} to {figure['high']:.3f}, {figure['items']} prompts"


def _share(share: dict[str, Any]) -> str:
    return "too few" if share["value"] is None else f"{share['value']:.1%} of {share['of']}"


def _run(url: str, key: str | None, work: Callable[[Maker], Awaitable[Tally]]) -> None:
    from alignkit_serve.label_making import Maker

    async def run() -> Tally:
        async with Maker(url, key, lambda line: click.echo(line, err=True)) as maker:
            return await work(maker)

    click.echo(asyncio.run(run()))
