"""The store: reads from any thread, writes through one, and an answer to a write only when it is on the disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Self, TypeVar

from sqlalchemy import Connection, Engine

from alignkit_serve.store import database
from alignkit_serve.store.errors import StoreUnavailable
from alignkit_serve.store.migrate import migrate
from alignkit_serve.store.writer import Writer

T = TypeVar("T")


class Store:
    """An open database. ``work`` is a function of a connection, made of those in the modules beside this one."""

    def __init__(self, name: str, readers: Engine, writers: Engine) -> None:
        self._name = name
        self._readers = readers
        self._writers = writers
        self._writer = Writer(writers, name)
        self._closed = False

    @classmethod
    def open(cls, url: str) -> Self:
        """Open ``sqlite:///PATH`` or ``postgresql://...``, with new tables where there are none and newer ones where they are old.

        Raises ``StoreError`` with one line that names the database, without its password, and why it cannot be opened.
        """
        parsed = database.parse(url)
        name = database.shown(parsed)
        with database.opening(name):
            database.make_folder(parsed)
            writers = database.writing(parsed)
            try:
                migrate(writers, name)
            except BaseException:
                writers.dispose()
                raise
        return cls(name, database.reading(parsed), writers)

    def write(self, work: Callable[[Connection], T]) -> Future[T]:
        """Run ``work`` in the writer's next transaction; the future is done when it is committed, durably.

        What waits is committed together, each piece of work under a savepoint: one that raises is undone alone, and its future raises the
        same. Where the database itself fails, the futures raise ``StoreUnavailable``; the store goes on when the cause is gone. Raises
        ``StoreUnavailable`` at once when the queue is full or the store closed. No ``work`` may wait for another.
        """
        return self._writer.submit(work)

    def read(self, work: Callable[[Connection], T]) -> T:
        """What ``work`` finds in one state of the database; it cannot write. Raises ``StoreUnavailable`` where the database fails."""
        if self._closed:
            raise StoreUnavailable(f"{self._name} is closed")
        with database.explained(self._name), self._readers.connect() as connection:
            return work(connection)

    async def awrite(self, work: Callable[[Connection], T]) -> T:
        """``write`` for asyncio. Cancelled while it waits in the queue, it is not written; later, it is."""
        return await asyncio.wrap_future(self.write(work))

    async def aread(self, work: Callable[[Connection], T]) -> T:
        """``read`` for asyncio."""
        return await asyncio.to_thread(self.read, work)

    def close(self) -> None:
        """Write what is queued, then disconnect. Closing twice is closing once."""
        self._writer.close()
        self._closed = True
        self._readers.dispose()
        self._writers.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
