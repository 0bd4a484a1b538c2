"""``alignkit rounds``, ``alignkit lineage`` and ``alignkit erase``: of a store, without a server. Light until they run."""

from __future__ import annotations

import getpass
import json
from pathlib import Path
from typing import Any

import click

from alignkit_serve.options import store_option

_json = click.option("--json", "as_json", is_flag=True, help="For programs.")


def rounds_command() -> click.Command:
    """``alignkit rounds``."""
    return rounds


def lineage_command() -> click.Command:
    """``alignkit lineage``."""
    return lineage


def erase_command() -> click.Command:
    """``alignkit erase``."""
    return erase


@click.command()
@store_option
@_json
def rounds(store: str, as_json: bool) -> None:
    """Every round, and what became of its policy.

    What it was trained on, how its policy did, and whether that was promoted.
    """
    from alignkit_serve import provenance, provenance_view
    from alignkit_serve.store import Store, lineage, policies, rounds

    with Store.open(store) as opened:
        found, exports, versions = opened.read(
            lambda connection: (rounds.listed(connection), lineage.exports(connection), policies.listed(connection))
        )
    if as_json:
        _say_json([provenance.round_json(made) for made in found])
    elif found:
        _say(provenance_view.rounds_table(found, exports, {version.id: version.name for version in versions}))
    else:
        click.echo(f"there is no round in {_named(store)} yet; a run that ends with a gate records one")


@click.group()
def lineage() -> None:
    """Which policies saw what, and what they are made of."""


@lineage.command("feedback")
@click.argument("id")
@store_option
@_json
def lineage_of_feedback(id: str, store: str, as_json: bool) -> None:
    """The exports, rounds and policies that feedback is in."""
    from alignkit_serve import provenance, provenance_view
    from alignkit_serve.store import Store, StoreError, lineage

    with Store.open(store) as opened:
        found = opened.read(lambda connection: lineage.of_feedback(connection, id))
    if found is None:
        raise StoreError(f"there is no feedback {id!r} in {_named(store)}; an id begins with fb-")
    if as_json:
        _say_json(provenance.feedback_lineage_json(found))
    else:
        _say(provenance_view.feedback_tree(found))


@lineage.command("policy")
@click.argument("policy")
@store_option
@_json
def lineage_of_policy(policy: str, store: str, as_json: bool) -> None:
    """What a policy, by name or id, came from and learnt from."""
    from alignkit_serve import provenance, provenance_view
    from alignkit_serve.store import Store, StoreError, lineage, policies

    with Store.open(store) as opened:
        found = opened.read(lambda connection: lineage.of_policy(connection, policy))
        names = [version.name for version in opened.read(policies.listed)]
    if found is None:
        raise StoreError(f"there is no policy {policy!r} in {_named(store)}; there are: {', '.join(names) or 'none'}")
    if as_json:
        _say_json(provenance.policy_lineage_json(found))
    else:
        _say(provenance_view.policy_tree(found))


@click.command()
@click.argument("subject")
@store_option
@click.option("--yes", is_flag=True, help="Remove the files too, without asking.")
def erase(subject: str, store: str, yes: bool) -> None:
    """Erase what an end user, or an annotator, has said.

    With what they asked goes what they were answered.

    SUBJECT is an end user's name as their application sends it in `user`, or an annotator's id (ann-...). It cannot be undone.
    """
    from alignkit_serve.exporting import ROWS
    from alignkit_serve.store import Store, erasure

    with Store.open(store) as opened:
        done = opened.write(lambda connection: erasure.erase(connection, subject, f"operator {getpass.getuser()}")).result()
    click.echo(f"erased: {', '.join(f'{count} {what}' for what, count in done.counts.items() if what not in ('running', 'exports'))}")
    if done.counts["running"]:
        click.echo(f"{done.counts['running']} answers are still in progress; erase once more when they are over", err=True)
    for made in done.reach.rounds:
        click.echo(f"round {made.name} was trained on some of it")
    for version in done.reach.policies:
        click.echo(f"policy {version.name} ({version.state}) saw some of it, or came from one that did")
    files = [file for export in done.reach.exports if (file := Path(export.path) / ROWS).exists()]
    if not files:
        return
    click.echo("files that hold some of it:")
    for file in files:
        click.echo(f"  {file}")
    if yes or click.confirm("remove them? No round can use them any more"):
        for file in files:
            file.unlink()
        click.echo(f"removed {len(files)} files")


def _say(what: Any) -> None:
    from rich.console import Console

    Console(highlight=False).print(what)


def _say_json(what: Any) -> None:
    click.echo(json.dumps(what, indent=2, ensure_ascii=False))


def _named(store: str) -> str:
    from alignkit_serve.store import database

    return database.shown(database.parse(store))
