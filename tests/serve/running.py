"""A real server for tests: uvicorn on a free port, a thread of this process, tiny policies, and the official client."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import uvicorn
import uvloop
from openai import OpenAI

from alignkit_serve import server
from alignkit_serve.app import create_app
from alignkit_serve.auth import Keys
from alignkit_serve.loading import load_policy
from alignkit_serve.redaction import Redact, unchanged
from alignkit_serve.roster import Load
from alignkit_serve.service import Service
from alignkit_serve.settings import Limits
from alignkit_serve.store import Store, keys


@dataclass
class Running:
    """A server that answers at ``url``. ``keys`` are texts by their scopes, made as they are asked for."""

    url: str
    store: Store
    app: Any
    loop: asyncio.AbstractEventLoop
    made: dict[tuple[str, ...], str] = field(default_factory=dict)

    @property
    def service(self) -> Service:
        """Its insides, for tests that look at them; to be touched in its loop only."""
        found: Service = self.app.state.service
        return found

    def key(self, *scopes: str, **limits: Any) -> str:
        """The text of a key."""
        if limits:
            return self.store.write(lambda connection: keys.create(connection, "test", scopes, created_by="test", **limits)).result()[1]
        if scopes not in self.made:
            self.made[scopes] = self.store.write(lambda connection: keys.create(connection, "test", scopes, created_by="test")).result()[1]
        return self.made[scopes]

    def openai(self, *scopes: str, **options: Any) -> OpenAI:
        """The official client."""
        return OpenAI(
            base_url=f"{self.url}/v1", api_key=self.key(*(scopes or ("infer",))), **{"max_retries": 0, "timeout": 60.0, **options}
        )

    def http(self, *scopes: str, **options: Any) -> httpx.Client:
        """A plain client with a key."""
        headers = {"Authorization": f"Bearer {self.key(*(scopes or ('infer',)))}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60.0, trust_env=False, **options)

    def inside(self, work: Callable[[], Awaitable[Any]]) -> Any:
        """Run something in the server's loop."""

        async def run() -> Any:
            return await work()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(60)


@contextmanager
def running(
    policy: Path,
    store: str,
    *,
    limits: Limits | None = None,
    auth: bool = True,
    models: Path | None = None,
    load: Load | None = None,
    redact: Redact = unchanged,
) -> Iterator[Running]:
    """Within, a server of ``policy``."""
    limits = limits or Limits()
    # With its protocol named, as the command does: asyncio looks there to send an answer at once, and not 40 ms later with the next.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    settings = server.Settings(
        policy=policy,
        host="127.0.0.1",
        port=port,
        store=store,
        auth=auth,
        models=models or policy.parent,
        exports=policy.parent / "exports",
        limits=limits,
        redact=redact,
    )
    with Store.open(store) as opened:
        begun: list[tuple[Any, uvicorn.Server, asyncio.AbstractEventLoop]] = []

        async def serve() -> None:
            async with server.opened(settings, opened, load or partial(load_policy, max_rows=limits.rows)) as (service, _):
                app = create_app(service, Keys(opened, required=auth), exports_to=settings.exports)
                own = uvicorn.Server(server.configuration(app, limits))
                begun.append((app, own, asyncio.get_running_loop()))
                await own.serve(sockets=[listening])
                await service.drain()

        thread = threading.Thread(target=lambda: uvloop.run(serve()), daemon=True)
        thread.start()
        until(lambda: (begun and begun[0][1].started) or not thread.is_alive())
        assert thread.is_alive(), "the server did not start"
        app, own, loop = begun[0]
        try:
            yield Running(f"http://127.0.0.1:{port}", opened, app, loop)
        finally:
            own.should_exit = True
            thread.join(30)
            assert not thread.is_alive(), "the server does not stop"


def until(true: Callable[[], Any], seconds: float = 30.0) -> None:
    """Wait for something to become true; fails when it does not."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
