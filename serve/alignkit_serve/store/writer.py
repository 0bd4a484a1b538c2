"""Group commit: many pieces of work share one transaction and one wait for the disk."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from alignkit_serve.store.database import explained
from alignkit_serve.store.errors import StoreUnavailable

T = TypeVar("T")

QUEUE = 10_000
"""Pieces of work that may wait. More would only wait longer than their clients do."""


@dataclass(frozen=True, slots=True)
class _Piece:
    work: Callable[[Connection], Any]
    future: Future[Any] = field(default_factory=Future)


class Writer:
    """One thread that takes all that waits, runs it in one transaction, and answers once it is committed."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine = engine
        self._name = name
        self._waiting: list[_Piece] = []
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._serve, name="alignkit-store-writer", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[Connection], T]) -> Future[T]:
        """Queue ``work``. Raises ``StoreUnavailable`` at once when too much waits already, or after ``close``."""
        piece = _Piece(work)
        with self._changed:
            if self._closed:
                raise StoreUnavailable(f"{self._name} is closed")
            if len(self._waiting) >= QUEUE:
                raise StoreUnavailable(f"{self._name} is overloaded: {QUEUE} writes wait; send this again later")
            self._waiting.append(piece)
            self._changed.notify()
        return piece.future

    def close(self) -> None:
        """Finish what waits, then stop."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _serve(self) -> None:
        while group := self._next():
            self._commit([piece for piece in group if piece.future.set_running_or_notify_cancel()])

    def _next(self) -> list[_Piece]:
        """All that waits, once anything does; empty when there will be nothing more."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            group, self._waiting = self._waiting, []
            return group

    def _commit(self, group: Sequence[_Piece]) -> None:
        try:
            with explained(self._name), self._engine.begin() as connection:
                answers = [self._run(connection, piece) for piece in group]
        # Whatever it is, nobody may wait for ever, and the thread goes on: the next group may find the cause gone.
        except BaseException as error:
            why = str(error) if isinstance(error, StoreUnavailable) else f"{self._name}: {error!r}"
            for piece in group:
                piece.future.set_exception(StoreUnavailable(f"{why}; this was not written"))
        else:
            for answer in answers:
                answer()

    def _run(self, connection: Connection, piece: _Piece) -> Callable[[], None]:
        """Run one piece so that its failure undoes it alone; returns what answers it after the commit."""
        connection.exec_driver_sql("SAVEPOINT piece")
        try:
            with explained(self._name):
                result = piece.work(connection)
                connection.exec_driver_sql("RELEASE SAVEPOINT piece")
        except BaseException as error:
            failure = error
            try:
                connection.exec_driver_sql("ROLLBACK TO SAVEPOINT piece")
                connection.exec_driver_sql("RELEASE SAVEPOINT piece")
            # The transaction itself is gone, as a full disk or a lost connection can end it: the whole group fails, for the first reason.
            except SQLAlchemyError as gone:
                raise (failure if isinstance(failure, StoreUnavailable) else gone) from None
            return lambda: piece.future.set_exception(failure)
        return lambda: piece.future.set_result(result)
