"""Opening: new tables where there are none, one clear line where it cannot be done, and never a password in it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, text

from alignkit_serve.store import Store, StoreError, StoreUnavailable, database
from alignkit_serve.store.keys import create, listed
from alignkit_serve.store.tables import REVISIONS, metadata
from tests.serve.databases import Postgres


def message(url: str) -> str:
    """What the user reads when this cannot be opened."""
    with pytest.raises(StoreError) as caught:
        Store.open(url)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def scalar(store: Store, statement: str) -> object:
    """What the connection that writes says."""
    return store.write(lambda connection: connection.exec_driver_sql(statement).scalar()).result()


def test_the_migrated_tables_are_those_of_the_metadata(store: Store) -> None:
    def difference(connection: Connection) -> object:
        context = MigrationContext.configure(connection, opts={"version_table": REVISIONS, "compare_server_default": True})
        return compare_metadata(context, metadata)

    assert store.read(difference) == []


def test_the_comparison_sees_a_table_that_was_changed(store: Store) -> None:
    def difference(connection: Connection) -> list[str]:
        connection.exec_driver_sql("ALTER TABLE api_key DROP COLUMN rate_rpm")
        connection.exec_driver_sql("DROP INDEX policy_version_live")
        return [found[0] for found in compare_metadata(MigrationContext.configure(connection, opts={"version_table": REVISIONS}), metadata)]

    assert sorted(store.write(difference).result()) == ["add_column", "add_index"]


def test_what_was_written_is_there_when_it_is_opened_again(database_url: str) -> None:
    with Store.open(database_url) as store:
        record, _ = store.write(lambda connection: create(connection, "a", ["infer"], created_by="test")).result()
    with Store.open(database_url) as store:
        assert store.read(listed) == [record]


def test_many_threads_open_a_new_database_at_once(database_url: str) -> None:
    problems: list[BaseException] = []

    def work() -> None:
        try:
            with Store.open(database_url) as store:
                store.write(lambda connection: create(connection, "a", ["infer"], created_by="test")).result()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    with Store.open(database_url) as store:
        assert len(store.read(listed)) == 8


def test_a_database_of_a_newer_version_is_refused_and_left_alone(database_url: str) -> None:
    with Store.open(database_url) as store:
        store.write(lambda connection: connection.execute(text(f"UPDATE {REVISIONS} SET version_num = '0999'"))).result()
    said = message(database_url)
    assert "was written by a newer alignkit: its tables have revision 0999, and this one knows them up to 0003" in said
    assert said.endswith("upgrade alignkit, or name another database")
    assert message(database_url) == said


def test_an_sqlite_store_syncs_every_commit_and_checks_foreign_keys(tmp_path: Path) -> None:
    with Store.open(f"sqlite:///{tmp_path / 'store.db'}") as store:
        settings = [scalar(store, f"PRAGMA {name}") for name in ("journal_mode", "synchronous", "foreign_keys")]
    assert settings == ["wal", 2, 1]


def test_a_postgresql_store_waits_for_the_disk_whatever_the_server_is_set_to(postgres: Postgres) -> None:
    postgres.execute("CREATE DATABASE hasty")
    postgres.execute("ALTER DATABASE hasty SET synchronous_commit = off")
    with Store.open(postgres.url("hasty")) as store:
        assert scalar(store, "SHOW synchronous_commit") == "on"
        assert scalar(store, "SHOW lock_timeout") == "5s"
    postgres.execute("DROP DATABASE hasty")


def test_a_path_is_taken_from_the_working_directory_and_its_folders_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Store.open("sqlite:///data/a%20b ü.db").close()
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["a b ü.db"]


ALLOWED = "; allowed: sqlite:///PATH or postgresql://USER:PASSWORD@HOST:PORT/NAME"
FILE = "a URL of SQLite names a file and nothing else: sqlite:///PATH, with a fourth / where the path begins at the root"
MEMORY = "a database in memory would lose what it acknowledged; name a file: sqlite:///PATH"
REFUSED = {
    "": f"the database URL '' cannot be read{ALLOWED}",
    "store.db": f"the database URL 'store.db' cannot be read{ALLOWED}",
    "u:SECRET@h": f"the database URL cannot be read{ALLOWED}",
    "postgresql://u:SECRET@h:port/d": f"the database URL cannot be read{ALLOWED}",
    "mysql://u:SECRET@h/d": f"the database URL begins with mysql://{ALLOWED}",
    "postgres://u:SECRET@h/d": f"the database URL begins with postgres://{ALLOWED}",
    "sqlite+aiosqlite:///a.db": f"the database URL begins with sqlite+aiosqlite://{ALLOWED}",
    "sqlite://": MEMORY,
    "sqlite:///": MEMORY,
    "sqlite:///:memory:": MEMORY,
    "sqlite://a.db": FILE,
    "sqlite:///a.db?mode=ro": FILE,
    "postgresql://u:p@SECRET@h/d": "the database URL has more than one @; write the one in the password as %40",
}


@pytest.mark.parametrize("url", REFUSED)
def test_a_url_of_no_database_that_can_be_used_is_refused(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert message(url) == REFUSED[url]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://u:SECRET@127.0.0.1:1/d", "postgresql://127.0.0.1:1/d cannot be opened: .*port 1 failed: Connection refused$"),
        ("postgresql://SECRET@127.0.0.1:1/d?password=SECRET", "postgresql://127.0.0.1:1/d cannot be opened: .*Connection refused"),
        ("postgresql://u:SECRET@/d?host=/nowhere", "postgresql:///d cannot be opened: .*No such file or directory"),
        ("postgresql://u:SECRET@127.0.0.1:1/d?nonsense=SECRET", 'cannot be opened: invalid connection option "nonsense"'),
    ],
)
def test_a_postgresql_that_cannot_be_reached_is_told_without_the_password(url: str, said: str) -> None:
    pytest.importorskip("psycopg")
    heard = message(url)
    assert re.search(said, heard), heard
    assert "SECRET" not in heard


def test_a_postgresql_database_that_does_not_exist(postgres: Postgres) -> None:
    assert 'database "none" does not exist' in message(postgres.url("none"))


def test_a_user_who_may_not_make_tables(postgres: Postgres) -> None:
    postgres.execute("CREATE ROLE reader LOGIN PASSWORD 'SECRET'")
    postgres.execute("CREATE DATABASE closed")
    said = message(postgres.url("closed").replace("alignkit@", "reader:SECRET@"))
    postgres.execute("DROP DATABASE closed")
    postgres.execute("DROP ROLE reader")
    assert "postgresql:///closed cannot be opened: permission denied for schema public" in said


def test_without_psycopg_there_is_a_line_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    assert message("postgresql://h/d").endswith("install it: pip install 'alignkit[postgres]'")


def test_sqlite_needs_no_psycopg(tmp_path: Path) -> None:
    program = "import sys; from alignkit_serve.store import Store; Store.open(sys.argv[1]).close(); print('psycopg' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program, f"sqlite:///{tmp_path}/store.db"], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("Not a database.\n" * 100)
    assert message(f"sqlite:///{notes}") == f"{notes} cannot be opened: it is not an SQLite database; name another file"
    assert notes.read_text() == "Not a database.\n" * 100


def test_a_damaged_database_is_told(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    Store.open(f"sqlite:///{path}").close()
    os.truncate(path, 5000)
    assert message(f"sqlite:///{path}") == f"{path} cannot be opened: the file is damaged; restore it from a backup"


def test_a_folder_in_place_of_a_file_and_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    no_way = "there is no way to it; check that it is a file, and that its folder may be written"
    assert message(f"sqlite:///{tmp_path}") == f"{tmp_path} cannot be opened: {no_way}"
    (tmp_path / "file").touch()
    assert message(f"sqlite:///{tmp_path}/file/store.db").startswith(f"{tmp_path}/file/store.db cannot be opened: ")


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A folder that may not be written to and has one in it that may, each with a database that may not, as a user who may little."""
    with tempfile.TemporaryDirectory() as folder:  # Not in pytest's own, which nobody but its owner may enter.
        place = Path(folder)
        for path in (place / "store.db", place / "open" / "store.db"):
            Store.open(f"sqlite:///{path}").close()
            path.chmod(0o444)
        (place / "open").chmod(0o777)
        place.chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        yield place
        if root:
            os.seteuid(0)
        place.chmod(0o755)


def test_what_may_not_be_written_is_not_opened(nobody: Path) -> None:
    no_way = "cannot be opened: there is no way to it; check that it is a file, and that its folder may be written"
    may_not = "cannot be opened: it may not be written; check the permissions of the file and its folder"
    assert message(f"sqlite:///{nobody}/new.db") == f"{nobody}/new.db {no_way}"
    assert message(f"sqlite:///{nobody}/store.db") == f"{nobody}/store.db {may_not}"
    assert message(f"sqlite:///{nobody}/open/store.db") == f"{nobody}/open/store.db {may_not}"
    assert message(f"sqlite:///{nobody}/new/a.db") == (
        f"{nobody}/new/a.db cannot be opened: the folder {nobody}/new cannot be made (Permission denied)"
    )


def test_a_database_that_another_keeps_locked_is_told(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_PATIENCE_MS", 200)
    with Store.open(database_url) as store:
        held, release = threading.Event(), threading.Event()

        def hold(connection: Connection) -> None:
            held.set()
            release.wait(60)

        holding = store.write(hold)
        held.wait(60)
        with pytest.raises(StoreUnavailable, match="cannot be opened: another process has kept it locked for 5 seconds"):
            Store.open(database_url)
        release.set()
        holding.result()
        Store.open(database_url).close()
