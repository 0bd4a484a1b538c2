"""Runs the application: binds where it may, starts the policy, and on SIGTERM lets what is in progress finish."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import click
import uvicorn
import uvloop
from fastapi import FastAPI

from alignkit.api import AlignkitError
from alignkit_serve.app import create_app
from alignkit_serve.auth import Keys
from alignkit_serve.browsers import is_loopback
from alignkit_serve.protocol import Protocol
from alignkit_serve.redaction import Redact, unchanged
from alignkit_serve.roster import Load, Roster
from alignkit_serve.scribe import Scribe
from alignkit_serve.service import Service
from alignkit_serve.settings import Limits
from alignkit_serve.store import Store, inferences, keys, secrets
from alignkit_serve.store.annotators import END_USERS


class ServeError(AlignkitError):
    """Settings that do not go together, or an address that cannot be had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What ``alignkit serve`` was told. ``models``: the folder that policies may be taken from while it runs.

    ``redact``: what becomes of texts before they are stored.
    """

    policy: Path
    host: str
    port: int
    store: str
    auth: bool
    models: Path
    limits: Limits
    exports: Path = Path("exports")
    redact: Redact = unchanged


def serve(settings: Settings, load: Load) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises ``AlignkitError`` before anything is bound where it cannot."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for library in ("alembic", "httpx"):
        logging.getLogger(library).setLevel(logging.WARNING)
    with Store.open(settings.store) as store:
        check_exposure(settings, has_keys=bool(store.read(keys.listed)))
        listening = _bound(settings.host, settings.port)
        # Port 0 means any that is free.
        settings = replace(settings, port=listening.getsockname()[1])
        uvloop.run(_serve(settings, store, load, listening))


async def _serve(settings: Settings, store: Store, load: Load, listening: socket.socket) -> None:
    async with opened(settings, store, load) as (service, policy):
        app = create_app(service, Keys(store, required=settings.auth), exports_to=settings.exports)
        await _Server(configuration(app, settings.limits), service, _greeting(settings, policy)).serve(sockets=[listening])


def configuration(app: FastAPI, limits: Limits) -> uvicorn.Config:
    """How uvicorn runs the application: its own log would hold ids and queries."""
    return uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=int(limits.drain_seconds) + 5,
    )


def check_exposure(settings: Settings, *, has_keys: bool) -> None:
    """Whether the address may be listened on. Raises ``ServeError``: beyond this machine only holders of keys may ask."""
    if is_loopback(settings.host):
        return
    if not settings.auth:
        raise ServeError(f"--no-auth with --host {settings.host} would let anyone on the network ask; allowed with --host 127.0.0.1 alone")
    if not has_keys:
        raise ServeError(
            f"--host {settings.host} is reachable from other machines and there is no API key yet; make one first: "
            f"alignkit keys create --scopes infer --store {shown_store(settings.store)}"
        )


def shown_store(url: str) -> str:
    """A store's URL without its password."""
    from sqlalchemy.engine import make_url

    return make_url(url).render_as_string(hide_password=True)


@asynccontextmanager
async def opened(settings: Settings, store: Store, load: Load) -> AsyncIterator[tuple[Service, str]]:
    """The service, and in words which policy it serves; at the end every engine is closed."""
    swept = await store.awrite(inferences.sweep)
    if swept:
        click.echo(f"{swept} answers were in progress when the last server died; they are marked as aborted")
    roster = Roster(store, load, settings.models)
    secret = await store.awrite(lambda connection: secrets.secret(connection, END_USERS))
    scribe = Scribe(settings.store)
    service = Service(store, scribe, roster, settings.limits, secret, settings.redact)
    try:
        policy = await roster.open(settings.policy)
        yield service, policy
    finally:
        await roster.close()
        await scribe.close()


def _greeting(settings: Settings, policy: str) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    store = shown_store(settings.store)
    same = store if store == settings.store else "URL, the same as here"
    key = f"make a key: alignkit keys create --scopes infer --store {same}" if settings.auth else "no key is needed (--no-auth)"
    return f"http://{host}:{settings.port} serves {policy}; store {store}; {key}"


class _Server(uvicorn.Server):
    """Uvicorn, but the first signal drains: it goes on answering 503 to new work, so that a balancer sees it, until the old is done."""

    def __init__(self, config: uvicorn.Config, service: Service, greeting: str) -> None:
        super().__init__(config)
        self._greeting = greeting
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen; then what is there stays: looking through all of it for garbage would stop every answer for a quarter of a second."""
        await super().startup(sockets)
        await self._service.scribe.start()
        gc.collect()
        gc.freeze()
        click.echo(self._greeting)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins to drain, a second one ends what is in progress, a third one waits for nothing."""
        self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        self._signals += 1
        if self._signals == 1:
            click.echo("draining: no new work is taken; once more stops at once", err=True)
            self._draining = asyncio.create_task(self._drain())
        elif self._signals == 2:
            self._service.give_up()
        else:
            self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        await self._service.drain()
        self.should_exit = True


def _bound(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises ``ServeError`` that says why it cannot."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise ServeError(
            f"{host}:{port} cannot be listened on: {os.strerror(error.errno or 0) if error.errno else error}; choose another --port"
        ) from error
    return found
