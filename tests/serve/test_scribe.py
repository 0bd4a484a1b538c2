"""The process that stores what comes in great numbers: it answers, dies, comes back, and ends with its server."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, select

from alignkit_serve.scribe import Scribe
from alignkit_serve.store import Store, StoreError, StoreUnavailable, secrets
from alignkit_serve.store.tables import secret
from tests.serve.running import until


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent is found by its name, and this module is nothing that is installed."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


def told(store: str, said: Callable[[Scribe], Awaitable[Any]]) -> Any:
    """What comes of a conversation with a scribe of an empty store."""
    Store.open(store).close()

    async def talk() -> Any:
        scribe = Scribe(store)
        try:
            return await said(scribe)
        finally:
            await scribe.close()

    return asyncio.run(talk())


def named(connection: Connection, name: str) -> bytes:
    """Something that writes."""
    return secrets.secret(connection, name)


def refuse(connection: Connection) -> None:
    """Something that writes, and then thinks better of it."""
    named(connection, "regretted")
    raise StoreError("not this")


def stumble(connection: Connection) -> None:
    """A mistake of the server's own."""
    named(connection, "regretted")
    connection.execute(select(7 // 0))


def whoami(connection: Connection) -> int:
    """The process that writes."""
    return os.getpid()


def names(store: str) -> set[str]:
    """What was written."""
    with Store.open(store) as opened:
        return opened.read(lambda connection: set(connection.scalars(select(secret.c.name))))


def alive(pid: int) -> bool:
    """Whether there is such a process; one that nobody has waited for yet is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_is_answered_is_written_and_what_raises_is_not(database_url: str) -> None:
    async def said(scribe: Scribe) -> None:
        first = await scribe.awrite(partial(named, name="kept"))
        assert await scribe.awrite(partial(named, name="kept")) == first
        with pytest.raises(StoreError, match="not this"):
            await scribe.awrite(refuse)
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            await scribe.awrite(stumble)
        assert await scribe.awrite(whoami) != os.getpid()

    told(database_url, said)
    assert names(database_url) == {"kept"}


def test_many_who_speak_at_once_each_get_their_own_answer(database_url: str) -> None:
    async def said(scribe: Scribe) -> list[bytes]:
        return await asyncio.gather(*(scribe.awrite(partial(named, name=str(i % 5))) for i in range(20)))

    answers = told(database_url, said)
    assert answers == answers[:5] * 4
    assert len(set(answers)) == 5


def test_one_that_died_is_followed_by_another(database_url: str) -> None:
    async def said(scribe: Scribe) -> tuple[int, int]:
        first = await scribe.awrite(whoami)
        os.kill(first, signal.SIGKILL)
        with pytest.raises(StoreUnavailable, match="send it again"):
            await scribe.awrite(partial(named, name="unknown"))
        return first, await scribe.awrite(whoami)

    first, second = told(database_url, said)
    assert first != second


def test_one_who_no_longer_waits_leaves_no_answer_to_the_next(database_url: str) -> None:
    async def said(scribe: Scribe) -> None:
        await scribe.start()
        impatient = asyncio.create_task(scribe.awrite(whoami))
        await asyncio.sleep(0.001)
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        assert isinstance(await scribe.awrite(partial(named, name="a")), bytes)

    told(database_url, said)


def test_signals_for_the_whole_group_are_left_to_the_server(database_url: str) -> None:
    async def said(scribe: Scribe) -> None:
        pid = await scribe.awrite(whoami)
        for each in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, each)
        assert await scribe.awrite(whoami) == pid

    told(database_url, said)


def test_it_ends_with_its_server(database_url: str) -> None:
    async def said(scribe: Scribe) -> int:
        return await scribe.awrite(whoami)

    pid = told(database_url, said)
    until(lambda: not alive(pid))
