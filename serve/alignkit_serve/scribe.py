"""A process that writes to the store beside the server's own, for what comes in great numbers.

Reading a request and storing what it says take about the same work, and two threads of one interpreter can only take turns at it. What is
written here is a function of a connection and its arguments, sent through a socket; the process ends when the other end of that is closed,
however the server ended. Both processes may write: the store has one transaction at a time, whoever begins it.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import signal
import socket
import subprocess
import sys
import traceback
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable
from io import BufferedIOBase
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine

from alignkit_serve.store import StoreError, StoreUnavailable, database

T = TypeVar("T")

_HEAD = 8
"""Bytes before a message, which say how long it is."""


class Scribe:
    """The server's end. The process is started when it is first needed, and anew when it died."""

    def __init__(self, store: str) -> None:
        self._store = store
        self._one = asyncio.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: tuple[StreamReader, StreamWriter] | None = None

    async def start(self) -> None:
        """Start the process, so that nobody has to wait for it: it takes a second until it can write."""
        async with self._one:
            await self._open()

    async def awrite(self, work: Callable[[Connection], T]) -> T:
        """Run ``work``, which can be pickled, in a transaction of its own; the answer comes when it is committed, durably.

        Raises what ``work`` raises, and ``StoreUnavailable``.
        """
        async with self._one:
            try:
                reader, writer = await self._open()
                writer.write(_message(work))
                answer: T | Exception = pickle.loads(await reader.readexactly(int.from_bytes(await reader.readexactly(_HEAD))))
            except (OSError, EOFError) as error:
                await self._end()
                raise StoreUnavailable(
                    "the process that stores feedback died; whether this was stored is not known: send it again, under the same key"
                ) from error
            except BaseException:
                await self._end()  # The next answer to come would be this one's.
                raise
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def close(self) -> None:
        """Let it finish, and end."""
        async with self._one:
            await self._end()

    async def _open(self) -> tuple[StreamReader, StreamWriter]:
        if self._channel is None:
            ours, theirs = socket.socketpair()
            with theirs:
                command = [sys.executable, "-P", "-m", __name__, str(theirs.fileno())]
                self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
            self._channel = await asyncio.open_connection(sock=ours)
            self._channel[1].write(_message(self._store))  # Not among the arguments, where anyone would see the password.
        return self._channel

    async def _end(self) -> None:
        if self._channel:
            self._channel[1].close()
        if self._process:
            await asyncio.to_thread(self._process.wait)
        self._process = self._channel = None


def _message(content: Any) -> bytes:
    packed = pickle.dumps(content, pickle.HIGHEST_PROTOCOL)
    return len(packed).to_bytes(_HEAD) + packed


def main() -> None:
    """The process: write what comes until nothing more can come."""
    # A signal to the whole group is for the server, which first lets its requests finish.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    # Where the server has gone, nobody is left to be told.
    with contextlib.suppress(ConnectionError), socket.socket(fileno=int(sys.argv[1])) as connected, connected.makefile("rwb") as channel:
        url = database.parse(_received(channel))
        name, engine = database.shown(url), database.writing(url)
        while work := _received(channel):
            channel.write(_message(_written(engine, name, work)))
            channel.flush()


def _received(channel: BufferedIOBase) -> Any:
    head = channel.read(_HEAD)
    return pickle.loads(channel.read(int.from_bytes(head))) if head else None


def _written(engine: Engine, name: str, work: Callable[[Connection], T]) -> T | Exception:
    try:
        with database.explained(name), engine.begin() as connection:
            return work(connection)
    except StoreUnavailable as error:
        return StoreUnavailable(f"{error}; this was not written")
    except StoreError as error:
        return error
    except Exception:
        return RuntimeError(traceback.format_exc())


if __name__ == "__main__":
    main()
