"""What a database URL means: which database, under which name it may be shown, how it is connected to, and what its errors say in words.

Writing is alike on both databases: one transaction at a time in the whole database, whichever process it comes from, durable when it is
committed. SQLite is made so; on PostgreSQL a transaction that writes begins with a lock of its own. Group commit makes up for it.
"""

from __future__ import annotations

import importlib
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, NotSupportedError, ProgrammingError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from alignkit_serve.store.errors import StoreError, StoreUnavailable
from alignkit_serve.store.values import json_text

_ALLOWED = "allowed: sqlite:///PATH or postgresql://USER:PASSWORD@HOST:PORT/NAME"
_PATIENCE_MS = 5000
_WRITERS = int.from_bytes(b"alignkit")
"""PostgreSQL's advisory lock that a transaction holds while it writes."""

_FULL = "the disk is full; free some space"
_LOCKED = f"another process has kept it locked for {_PATIENCE_MS // 1000} seconds"
_REASONS: dict[object, str] = {
    sqlite3.SQLITE_FULL: _FULL,
    "53100": _FULL,
    sqlite3.SQLITE_BUSY: _LOCKED,
    "55P03": _LOCKED,
    sqlite3.SQLITE_NOTADB: "it is not an SQLite database; name another file",
    sqlite3.SQLITE_CORRUPT: "the file is damaged; restore it from a backup",
    sqlite3.SQLITE_READONLY: "it may not be written; check the permissions of the file and its folder",
    sqlite3.SQLITE_CANTOPEN: "there is no way to it; check that it is a file, and that its folder may be written",
}
"""By SQLite's error code or PostgreSQL's SQLSTATE."""


def parse(text: str) -> URL:
    """The URL with the driver that alignkit uses. Raises ``StoreError`` for what is no URL of a database that it can use."""
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:
        # With an @ it may hold a password.
        raise StoreError(f"the database URL{'' if '@' in text else f' {text!r}'} cannot be read; {_ALLOWED}") from error
    if url.drivername == "sqlite":
        return _sqlite(url)
    if url.drivername == "postgresql":
        return _postgresql(url)
    raise StoreError(f"the database URL begins with {url.drivername}://; {_ALLOWED}")


def shown(url: URL) -> str:
    """The database in messages: without user, password and query, in which there may be a password too."""
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    return URL.create("postgresql", host=url.host, port=url.port, database=url.database).render_as_string()


def writing(url: URL) -> Engine:
    """One connection, whose transactions are the only ones that write while they run, and are on the disk once they are committed."""
    if url.get_backend_name() == "sqlite":
        engine = _engine(url, pool_size=1, max_overflow=0)
        _prepare_sqlite(engine, ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=0"), begin=_begin_immediate)
    else:
        engine = _engine(url, pool_size=1, max_overflow=0, pool_pre_ping=True)
        _prepare_postgresql(engine, ("synchronous_commit=on", f"lock_timeout={_PATIENCE_MS}"))
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITERS})"))
    return engine


def reading(url: URL) -> Engine:
    """Connections that see one state of the database from their first statement to their last, and cannot write."""
    if url.get_backend_name() == "sqlite":
        engine = _engine(url)
        _prepare_sqlite(engine, ("query_only=ON",), begin=lambda connection: connection.exec_driver_sql("BEGIN"))
        return engine
    return _engine(url, pool_pre_ping=True, isolation_level="REPEATABLE READ", execution_options={"postgresql_readonly": True})


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Within, what the database called ``name`` cannot do for want of room, access or connection becomes a ``StoreUnavailable``."""
    try:
        yield
    except (IntegrityError, DataError, ProgrammingError, NotSupportedError):
        raise  # Nothing is wrong with the database: with the statement.
    except (DBAPIError, PoolTimeout) as error:
        raise StoreUnavailable(f"{name}: {reason(error)}") from error


@contextmanager
def opening(name: str) -> Iterator[None]:
    """Within, whatever keeps the database called ``name`` from being opened becomes a ``StoreUnavailable``."""
    try:
        yield
    except SQLAlchemyError as error:
        raise StoreUnavailable(f"{name} cannot be opened: {reason(error)}") from error


def reason(error: SQLAlchemyError) -> str:
    """Why, in one line."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig else error
    # Errors that the drivers themselves raise have no code.
    code = getattr(cause, "sqlite_errorcode", 0) & 0xFF or getattr(cause, "sqlstate", None)
    return _REASONS.get(code) or str(cause).partition("\n")[0]


def _sqlite(url: URL) -> URL:
    if url.host or url.query:
        raise StoreError("a URL of SQLite names a file and nothing else: sqlite:///PATH, with a fourth / where the path begins at the root")
    if url.database in (None, "", ":memory:"):
        raise StoreError("a database in memory would lose what it acknowledged; name a file: sqlite:///PATH")
    return url


def _postgresql(url: URL) -> URL:
    if url.host and "@" in url.host:
        raise StoreError("the database URL has more than one @; write the one in the password as %40")
    try:
        importlib.import_module("psycopg")
    except ImportError as error:
        raise StoreError(f"PostgreSQL needs psycopg ({error}); install it: pip install 'alignkit[postgres]'") from error
    patient = {"connect_timeout": str(_PATIENCE_MS // 1000), "tcp_user_timeout": str(2 * _PATIENCE_MS)}
    return url.set(drivername="postgresql+psycopg", query={**patient, **url.query})


def _engine(url: URL, **options: Any) -> Engine:
    # Parameters hold people's prompts: no error message and no log shows them.
    return create_engine(url, hide_parameters=True, json_serializer=json_text, **options)


def _prepare_sqlite(engine: Engine, pragmas: Sequence[str], *, begin: Callable[[Connection], object]) -> None:
    def prepare(connection: sqlite3.Connection, record: object) -> None:
        connection.isolation_level = None  # The driver would begin transactions by itself, later, and never IMMEDIATE.
        for pragma in (f"busy_timeout={_PATIENCE_MS}", *pragmas):
            connection.execute(f"PRAGMA {pragma}")

    event.listen(engine, "connect", prepare)
    event.listen(engine, "begin", begin)


def _begin_immediate(connection: Connection) -> None:
    """Begin as the only one that writes.

    SQLite's own waiting looks ten times a second, and a process with much to write leaves the lock alone for a fraction of a millisecond
    between two groups: another would starve.
    """
    driver: Any = connection.connection.driver_connection
    until = time.monotonic() + _PATIENCE_MS / 1000
    while time.monotonic() < until:
        try:
            driver.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                break
            time.sleep(0.001)
        else:
            return
    connection.exec_driver_sql("BEGIN IMMEDIATE")  # Once more, for its error.


def _prepare_postgresql(engine: Engine, settings: Sequence[str]) -> None:
    def prepare(connection: Any, record: object) -> None:
        for setting in settings:
            connection.execute(f"SET {setting}")
        connection.commit()

    event.listen(engine, "connect", prepare)


def make_folder(url: URL) -> None:
    """The folder of an SQLite file. Raises ``StoreError``."""
    if url.get_backend_name() == "sqlite":
        folder = Path(str(url.database)).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreUnavailable(f"{shown(url)} cannot be opened: the folder {folder} cannot be made ({error.strerror})") from error
