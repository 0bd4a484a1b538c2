"""The server's commands. Light: what is heavy is imported when a command runs."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click

from alignkit_serve.options import key_option, store_option, url_option


def serve_command() -> click.Command:
    """``alignkit serve``."""
    return serve


def keys_command() -> click.Command:
    """``alignkit keys``."""
    return keys


def promote_command() -> click.Command:
    """``alignkit promote``."""
    return promote


def rollback_command() -> click.Command:
    """``alignkit rollback``."""
    return rollback


def policies_command() -> click.Command:
    """``alignkit policies``."""
    return policies


def chat_command() -> click.Command:
    """``alignkit chat``."""
    return chat


def audit_command() -> click.Command:
    """``alignkit audit``."""
    return audit


@click.command()
@click.argument("policy", metavar="RUN_OR_POLICY", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Beyond this machine, keys are needed.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@store_option
@click.option("--no-auth", is_flag=True, help="No keys: anyone on this machine may do anything.")
@click.option(
    "--models",
    type=click.Path(path_type=Path, file_okay=False),
    help="The folder that policies may be promoted from (RUN_OR_POLICY's own).",
)
@click.option(
    "--exports",
    type=click.Path(path_type=Path, file_okay=False),
    default="exports",
    show_default=True,
    help="The folder that exports are written to.",
)
@click.option("--rows", type=click.IntRange(min=1), default=32, show_default=True, help="Answers that grow at once.")
@click.option("--queue", type=click.IntRange(min=1), default=128, show_default=True, help="Answers let in, growing or waiting.")
@click.option(
    "--drain", type=click.FloatRange(min=0), default=30.0, show_default=True, help="Seconds that answers have to finish at the end."
)
@click.option(
    "--upstream", metavar="URL", help="Forward to this OpenAI-compatible server instead; RUN_OR_POLICY is the model's name there."
)
@click.option("--redact", is_flag=True, help="Store no e-mail addresses, phone, account and card numbers, and IP addresses.")
def serve(
    policy: Path,
    host: str,
    port: int,
    store: str,
    no_auth: bool,
    models: Path | None,
    exports: Path,
    rows: int,
    queue: int,
    drain: float,
    upstream: str | None,
    redact: bool,
) -> None:
    """Serve a policy behind an OpenAI-compatible API.

    RUN_OR_POLICY is a run's folder (the last policy that it made), one of its stages, or any transformers folder.
    """
    from alignkit.threads import wait_briefly

    wait_briefly()
    from alignkit_serve import server
    from alignkit_serve.artifact import locate
    from alignkit_serve.redaction import redacted, unchanged
    from alignkit_serve.settings import Limits

    limits = Limits(rows=rows, queued_requests=queue, drain_seconds=drain)
    if not upstream:
        locate(policy)  # a mistake is told before anything heavy is imported

    async def load(path: Path) -> Any:
        from alignkit_serve import loading

        if upstream:
            return await loading.load_upstream(path, url=upstream, key=os.environ.get("ALIGNKIT_UPSTREAM_API_KEY"))
        return await loading.load_policy(path, max_rows=rows)

    folder = models or (Path.cwd() if upstream else policy.resolve().parent)
    settings = server.Settings(
        policy=policy,
        host=host,
        port=port,
        store=store,
        auth=not no_auth,
        models=folder,
        exports=exports,
        limits=limits,
        redact=redacted if redact else unchanged,
    )
    server.serve(settings, load)


@click.group()
def keys() -> None:
    """Who may ask the server, and for what."""


@keys.command("create")
@click.option("--name", default="", help="What it is for, for people.")
@click.option("--scopes", default="infer", show_default=True, help="What it allows, separated by commas.")
@click.option("--rate", type=click.IntRange(min=1), help="Requests a minute.")
@click.option("--concurrency", type=click.IntRange(min=1), help="Answers in progress.")
@click.option("--days", type=click.FloatRange(min=0), help="How long it is in force.")
@store_option
def create_key(name: str, scopes: str, rate: int | None, concurrency: int | None, days: float | None, store: str) -> None:
    """Make a key and print it, once: only a hash of it is kept."""
    from alignkit_serve.store import Store, audit, keys

    wanted = [scope.strip() for scope in scopes.split(",") if scope.strip()]
    expires = None if days is None else datetime.now(UTC) + timedelta(days=days)

    def create(connection: Any) -> tuple[Any, str]:
        record, text = keys.create(
            connection, name, wanted, rate_rpm=rate, max_inflight=concurrency, expires_at=expires, created_by=_operator()
        )
        audit.record(connection, _operator(), "key.create", record.public_id, {"scopes": list(record.scopes), "name": name})
        return record, text

    with Store.open(store) as opened:
        _, text = opened.write(create).result()
    click.echo(text)


@keys.command("list")
@store_option
def list_keys(store: str) -> None:
    """Every key, those out of force too."""
    from alignkit_serve.store import Store, keys

    with Store.open(store) as opened:
        records = opened.read(keys.listed)
    if not records:
        click.echo(f"there is no key in {store} yet; make one: alignkit keys create --scopes infer")
    for record in records:
        force = (
            "revoked" if record.revoked_at else "expired" if record.expires_at and record.expires_at <= datetime.now(UTC) else "in force"
        )
        used = record.last_used_at.strftime("%Y-%m-%d %H:%M") if record.last_used_at else "never"
        click.echo(f"{record.public_id}  {force:<8}  last used {used:<16}  {','.join(record.scopes):<28}  {record.name}")


@keys.command("revoke")
@click.argument("public_id")
@store_option
def revoke_key(public_id: str, store: str) -> None:
    """Put a key out of force, at once."""
    from alignkit_serve.store import Store, audit, keys

    def revoke(connection: Any) -> None:
        keys.revoke(connection, public_id)
        audit.record(connection, _operator(), "key.revoke", public_id, {})

    with Store.open(store) as opened:
        opened.write(revoke).result()
    click.echo(f"{public_id} is revoked")


@click.command()
@click.argument("policy")
@url_option
@key_option
def promote(policy: str, url: str, key: str | None) -> None:
    """Let another policy answer from now on.

    POLICY is a path below the server's --models, or the name of one that is warm.
    """
    from alignkit_serve.client import Client

    version = Client(url, key).promote(policy)
    click.echo(f"{version['name']} is {version['state']}")


@click.command()
@url_option
@key_option
def rollback(url: str, key: str | None) -> None:
    """Put the policy that was live before back in its place."""
    from alignkit_serve.client import Client

    version = Client(url, key).rollback()
    click.echo(f"{version['name']} is {version['state']}")


@click.command()
@url_option
@key_option
def policies(url: str, key: str | None) -> None:
    """Every policy that a server knows, with its state."""
    from alignkit_serve.client import Client

    for version in Client(url, key).policies():
        click.echo(f"{version['state']:<9} {version['name']:<40} {version['path']}")


@click.command()
@url_option
@key_option
@click.option("--model", default="live", show_default=True, help="Which policy.")
@click.option("--system", help="What it is told first.")
@click.option("--temperature", type=click.FloatRange(0, 2), default=1.0, show_default=True)
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True)
def chat(url: str, key: str | None, model: str, system: str | None, temperature: float, max_tokens: int) -> None:
    """Talk to a served policy in the terminal."""
    from alignkit_serve.terminal import chat as talk

    talk(url, key, model, system, temperature, max_tokens)


@click.group()
def audit() -> None:
    """Who did what to keys and policies."""


@audit.command("verify")
@store_option
def verify_audit(store: str) -> None:
    """Check that no row of the audit was changed, removed or moved."""
    from alignkit_serve.store import Store, StoreError, audit

    with Store.open(store) as opened:
        problem = opened.read(audit.verify)
    if problem:
        raise StoreError(f"{store}: {problem}")
    click.echo("the audit is whole")


@audit.command("show")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@store_option
def show_audit(limit: int, store: str) -> None:
    """The newest rows, the oldest of them first."""
    from alignkit_serve.store import Store, audit

    with Store.open(store) as opened:
        entries = opened.read(lambda connection: audit.entries(connection, limit))
    for entry in reversed(entries):
        click.echo(f"{entry.at:%Y-%m-%d %H:%M:%S}  {entry.actor:<20}  {entry.action:<12}  {entry.object}")


def _operator() -> str:
    import getpass

    return f"operator {getpass.getuser()}"
