"""Reading and writing: what is acknowledged is committed, what fails fails alone, and what ails the database passes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from alignkit_serve.store import Store, StoreError, StoreUnavailable, new_id, writer
from alignkit_serve.store.policies import by_name, register
from alignkit_serve.store.tables import fields_of, policy_version
from tests.serve.databases import Postgres
from tests.serve.store.rows import a_policy


def naming(name: str, **values: Any) -> Callable[[Connection], str]:
    """Work that writes a row of this name, and returns the name."""

    def work(connection: Connection) -> str:
        connection.execute(insert(policy_version), fields_of(a_policy(name=name, **values)))
        return name

    return work


def names(store: Store) -> list[str]:
    return store.read(lambda connection: list(connection.scalars(select(policy_version.c.name).order_by(policy_version.c.id))))


@contextmanager
def held(store: Store) -> Iterator[None]:
    """Within, the writer is busy with a slow piece of work, and all that is written waits for it."""
    busy, done = threading.Event(), threading.Event()

    def work(connection: Connection) -> None:
        busy.set()
        done.wait(60)

    slow = store.write(work)
    busy.wait(60)
    try:
        yield
    finally:
        done.set()
        slow.result(60)


@contextmanager
def counted() -> Iterator[list[Engine]]:
    """The commits that happen within."""
    commits: list[Engine] = []

    def note(connection: Connection) -> None:
        commits.append(connection.engine)

    event.listen(Engine, "commit", note)
    yield commits
    event.remove(Engine, "commit", note)


def test_a_write_is_there_for_all_once_its_future_is_done(database_url: str) -> None:
    with Store.open(database_url) as one, Store.open(database_url) as other:
        assert one.write(naming("a")).result() == "a"
        assert other.read(lambda connection: by_name(connection, "a")) is not None


def test_nothing_is_acknowledged_before_it_is_committed(database_url: str) -> None:
    with Store.open(database_url) as store:
        with held(store):
            waiting = store.write(naming("a"))
            assert not waiting.done()
            assert names(store) == []
        waiting.result()
        assert names(store) == ["a"]


def test_what_waits_is_committed_together_in_the_order_of_its_arrival(store: Store) -> None:
    with counted() as commits:
        with held(store):
            futures = [store.write(naming(f"{number:02}")) for number in range(50)]
        assert [future.result() for future in futures] == names(store) == [f"{number:02}" for number in range(50)]
    assert len(commits) == 2  # The slow one, and all that waited for it.


def test_writes_of_many_threads_need_fewer_commits_than_there_are_writes(store: Store) -> None:
    def work(thread: int) -> None:
        for number in range(20):
            store.write(naming(f"{thread}-{number}")).result()

    with counted() as commits:
        with held(store):
            threads = [threading.Thread(target=work, args=(thread,)) for thread in range(16)]
            for thread in threads:
                thread.start()
        for thread in threads:
            thread.join()
    assert len(names(store)) == 320
    assert len(commits) < 320


def swallow(connection: Connection) -> None:
    """Work that hides that a statement failed: PostgreSQL then takes no more of the transaction."""
    naming("hidden")(connection)
    try:
        connection.exec_driver_sql("SELECT nonsense")
    except DBAPIError:
        return


def leave(connection: Connection) -> None:
    naming("left")(connection)
    raise SystemExit(3)


def test_a_bad_write_fails_alone_and_leaves_nothing(store: Store) -> None:
    store.write(naming("taken")).result()

    def half(connection: Connection) -> None:
        naming("half")(connection)
        raise KeyError("changed my mind")

    with held(store):
        first = store.write(naming("first"))
        bad: list[Future[Any]] = [
            store.write(half),
            store.write(naming("taken")),
            store.write(naming("orphan", parent_id="none")),
            store.write(leave),
        ]
        swallowed = store.write(swallow)
        last = store.write(naming("last"))
    assert (first.result(), last.result()) == ("first", "last")
    assert [type(each.exception()) for each in bad] == [KeyError, IntegrityError, IntegrityError, SystemExit]
    # SQLite does not mind, and then it is written; PostgreSQL does, and then that is told.
    told = swallowed.exception() is not None
    assert told == (store.read(lambda connection: connection.dialect.name) == "postgresql")
    assert names(store) == ["taken", "first", *([] if told else ["hidden"]), "last"]


def test_errors_of_the_database_show_nobodys_words(store: Store) -> None:
    store.write(naming("taken")).result()
    with pytest.raises(IntegrityError) as caught:
        store.write(naming("taken", path="what somebody said")).result()
    assert "what somebody said" not in str(caught.value)


def test_a_read_sees_one_state_and_cannot_write(store: Store) -> None:
    def count(connection: Connection) -> int:
        return len(connection.scalars(select(policy_version.c.id)).all())

    def twice(connection: Connection) -> tuple[int, int]:
        before = count(connection)
        store.write(naming("meanwhile")).result()
        return before, count(connection)

    assert store.read(twice) == (0, 0)
    assert store.read(count) == 1
    with pytest.raises(Exception, match=r"may not be written|in a read-only transaction"):
        store.read(naming("by mistake"))
    assert names(store) == ["meanwhile"]


def test_more_threads_read_than_there_are_connections(store: Store) -> None:
    store.write(naming("a")).result()
    found: list[list[str]] = []
    threads = [threading.Thread(target=lambda: found.extend(names(store) for _ in range(5))) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [["a"]] * 200


def test_a_full_queue_refuses_at_once_and_what_it_holds_is_written(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "QUEUE", 3)
    with held(store):
        waiting = [store.write(naming(name)) for name in "abc"]
        with pytest.raises(StoreUnavailable, match="is overloaded: 3 writes wait; send this again later"):
            store.write(naming("d"))
    assert [future.result() for future in waiting] == names(store) == ["a", "b", "c"]
    assert store.write(naming("d")).result() == "d"


def test_closing_writes_what_waits_and_takes_no_more(database_url: str) -> None:
    store = Store.open(database_url)
    with held(store):
        waiting = [store.write(naming(name)) for name in "abc"]
        closing = threading.Thread(target=store.close)
        closing.start()
    closing.join()
    assert all(future.done() for future in waiting)
    with pytest.raises(StoreUnavailable, match="is closed"):
        store.write(naming("d"))
    with pytest.raises(StoreUnavailable, match="is closed"):
        names(store)
    store.close()
    with Store.open(database_url) as again:
        assert names(again) == ["a", "b", "c"]


def test_asyncio_writes_and_reads_without_blocking(store: Store) -> None:
    async def story() -> tuple[list[str], list[str]]:
        written = await asyncio.gather(*(store.awrite(naming(f"{number:02}")) for number in range(20)))
        with pytest.raises(IntegrityError):
            await store.awrite(naming("00"))
        return written, await store.aread(lambda connection: list(connection.scalars(select(policy_version.c.name))))

    written, found = asyncio.run(story())
    assert written == sorted(found) == [f"{number:02}" for number in range(20)]


def test_a_write_that_is_cancelled_while_it_waits_is_not_written(store: Store) -> None:
    async def story() -> None:
        with held(store):
            unwanted = asyncio.ensure_future(store.awrite(naming("unwanted")))
            wanted = asyncio.ensure_future(store.awrite(naming("wanted")))
            await asyncio.sleep(0)
            unwanted.cancel()
            await asyncio.sleep(0)
        assert await wanted == "wanted"
        assert unwanted.cancelled()

    asyncio.run(story())
    assert names(store) == ["wanted"]


LARGE = "x" * 300_000


def test_a_database_that_is_full_fails_the_writes_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    """SQLite undoes the whole transaction in the middle of a statement here, and with it the writes that had room."""
    with Store.open(f"sqlite:///{tmp_path / 'store.db'}") as store:
        store.write(naming("before")).result()
        pages: Any = store.write(lambda connection: connection.exec_driver_sql("PRAGMA page_count").scalar()).result()
        store.write(lambda connection: connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 4}").scalar()).result()
        with held(store):
            group = [store.write(naming(name, path=path)) for name, path in (("small", "p"), ("large", LARGE), ("small too", "p"))]
        failed = [future.exception() for future in group]
        assert any(failed)
        for future, name in zip(group, ("small", "large", "small too"), strict=True):
            assert (future.exception() is None) == (name in names(store))
        for error in failed:
            assert error is None or "store.db: the disk is full; free some space" in str(error)
        assert isinstance(failed[1], StoreUnavailable)
        store.write(lambda connection: connection.exec_driver_sql("PRAGMA max_page_count = 100000").scalar()).result()
        assert store.write(naming("large", path=LARGE)).result() == "large"
        assert names(store)[0] == "before"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], check=False).returncode:
        pytest.skip("a small disk cannot be mounted here: that needs root")
    yield place
    subprocess.run(["umount", place], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all the room there is."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as handle, suppress(OSError):
        while True:
            handle.write(bytes(4096))
    return ballast


def test_a_full_disk_fails_the_whole_group_and_nothing_of_it_is_there(small_disk: Path) -> None:
    with Store.open(f"sqlite:///{small_disk / 'store.db'}") as store:
        store.write(naming("before")).result()
        ballast = fill(small_disk)
        with held(store):
            group = [store.write(naming(f"during-{number}", path=LARGE)) for number in range(3)]
        for future in group:
            assert isinstance(future.exception(), StoreUnavailable)
            assert "store.db: the disk is full; free some space; this was not written" in str(future.exception())
        assert names(store) == ["before"]
        ballast.unlink()
        assert store.write(naming("after")).result() == "after"
        assert names(store) == ["before", "after"]
    with Store.open(f"sqlite:///{small_disk / 'store.db'}") as store:
        assert names(store) == ["before", "after"]


def test_a_locked_database_fails_the_group_and_goes_on_when_it_is_free(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit_serve.store.database._PATIENCE_MS", 200)
    with Store.open(database_url) as one, Store.open(database_url) as other:
        with held(one), pytest.raises(StoreUnavailable, match="another process has kept it locked for 5 seconds; this was not written"):
            other.write(naming("a")).result()
        assert other.write(naming("b")).result() == "b"
        assert names(one) == ["b"]


@pytest.fixture
def on_postgres(postgres: Postgres) -> Iterator[Store]:
    name = new_id("test_")
    postgres.execute(f"CREATE DATABASE {name}")
    with Store.open(postgres.url(name)) as store:
        yield store
    postgres.execute(f"DROP DATABASE {name} WITH (FORCE)")


def test_a_connection_lost_in_the_middle_fails_the_group_and_the_next_one_is_written(on_postgres: Store) -> None:
    def cut_off(connection: Connection) -> None:
        connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    with held(on_postgres):
        group = [on_postgres.write(work) for work in (naming("a"), cut_off, naming("b"))]
    for future in group:
        assert isinstance(future.exception(), StoreUnavailable)
        assert str(future.exception()).endswith("terminating connection due to administrator command; this was not written")
    assert on_postgres.write(naming("c")).result() == "c"
    assert names(on_postgres) == ["c"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT])
def test_a_server_that_goes_and_comes_back_costs_what_was_written_meanwhile(
    on_postgres: Store, postgres: Postgres, how: signal.Signals
) -> None:
    on_postgres.write(naming("before")).result()
    assert names(on_postgres) == ["before"]
    postgres.stop(how)
    try:
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match=r"^postgresql:///test_\w+: .*; this was not written$"):
                on_postgres.write(naming("meanwhile")).result()
            with pytest.raises(StoreUnavailable, match=r"^postgresql:///test_\w+: "):
                names(on_postgres)
    finally:
        postgres.start()
    assert on_postgres.write(naming("after")).result() == "after"
    assert names(on_postgres) == ["before", "after"]


def test_store_errors_are_told_as_they_are(store: Store) -> None:
    version = a_policy(name="a")
    store.write(lambda connection: register(connection, version)).result()
    with pytest.raises(StoreError, match=r"^there is a policy 'a' already; give this one another name$"):
        store.write(lambda connection: register(connection, version)).result()
