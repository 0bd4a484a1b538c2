"""A process that stores feedback beside the server's own, for it comes in great numbers.

Reading a request and storing what it says take about the same work, and two threads of one interpreter can only take turns at it. Opinions
go through a socket as JSON, and what became of them comes back; the process ends when the other end of that is closed, however the server
ended. Both processes may write: the store has one transaction at a time, whoever begins it.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import traceback
from asyncio import StreamReader, StreamWriter
from collections.abc import Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Literal

from pydantic import TypeAdapter
from sqlalchemy import Engine

from alignkit_serve.store import StoreError, StoreUnavailable, database, feedback
from alignkit_serve.store.feedback import Opinion, Outcome

_HEAD = 8
"""Bytes before a message, which say how long it is."""


@dataclass(frozen=True, slots=True)
class _Failed:
    """Why nothing became of any of them."""

    what: Literal["unavailable", "refused", "mistake"]
    why: str

    def error(self) -> Exception:
        """What is raised at the server's end."""
        return {"unavailable": StoreUnavailable, "refused": StoreError, "mistake": RuntimeError}[self.what](self.why)


_OPINIONS: TypeAdapter[list[Opinion]] = TypeAdapter(list[Opinion])
_ANSWER: TypeAdapter[list[Outcome] | _Failed] = TypeAdapter(list[Outcome] | _Failed)


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

    async def add(self, opinions: Sequence[Opinion]) -> list[Outcome]:
        """What ``feedback.add`` says of them, once it is committed, durably. Raises what that raises, and ``StoreUnavailable``."""
        said = _message(_OPINIONS.dump_json([opinion.storable() for opinion in opinions]))
        async with self._one:
            try:
                reader, writer = await self._open()
                writer.write(said)
                answer = _ANSWER.validate_json(await reader.readexactly(int.from_bytes(await reader.readexactly(_HEAD))))
            except (OSError, EOFError) as error:
                await self._end()
                raise StoreUnavailable(
                    "the process that stores feedback died; whether this was stored is not known: send it again, under the same key"
                ) from error
            except BaseException:
                await self._end()  # The next answer to come would be this one's.
                raise
        if isinstance(answer, _Failed):
            raise answer.error()
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
            self._channel[1].write(_message(self._store.encode()))  # Not among the arguments, where anyone would see the password.
        return self._channel

    async def _end(self) -> None:
        if self._channel:
            self._channel[1].close()
        if self._process:
            await asyncio.to_thread(self._process.wait)
        self._process = self._channel = None


def _message(content: bytes) -> bytes:
    return len(content).to_bytes(_HEAD) + content


def main() -> None:
    """The process: store what comes until nothing more can come."""
    # A signal to the whole group is for the server, which first lets its requests finish.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    # Where the server has gone, nobody is left to be told.
    with contextlib.suppress(ConnectionError), socket.socket(fileno=int(sys.argv[1])) as connected, connected.makefile("rwb") as channel:
        url = database.parse(_received(channel).decode())
        name, engine = database.shown(url), database.writing(url)
        while opinions := _received(channel):
            channel.write(_message(_ANSWER.dump_json(_stored(engine, name, opinions))))
            channel.flush()


def _received(channel: BufferedIOBase) -> bytes:
    """The next message; empty when there will be none."""
    return channel.read(int.from_bytes(channel.read(_HEAD)))


def _stored(engine: Engine, name: str, opinions: bytes) -> list[Outcome] | _Failed:
    try:
        with database.explained(name), engine.begin() as connection:
            return feedback.add(connection, _OPINIONS.validate_json(opinions))
    except StoreUnavailable as error:
        return _Failed("unavailable", f"{error}; this was not written")
    except StoreError as error:
        return _Failed("refused", str(error))
    # A mistake of alignkit's: it is raised at the server's end, with this traceback, for those whose opinions these were. The process stays
    # for all others, whose opinions are sent again one by one.
    except Exception:
        return _Failed("mistake", traceback.format_exc())


if __name__ == "__main__":
    main()
