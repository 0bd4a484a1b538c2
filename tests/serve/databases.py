"""Both databases that the server runs on, for tests: an SQLite file, and a real PostgreSQL server that lives as long as the session."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alignkit_serve.store import Store
from tests.environments import missing

_DEBIAN = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))


class Postgres:
    """A server of our own on a socket in ``folder``. It refuses root, and so runs as nobody where the tests run as root."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self._binaries = binaries
        self._folder = folder
        self._as_nobody = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"] if os.geteuid() == 0 else ["setpriv"]
        if os.geteuid() == 0:
            shutil.chown(folder, "nobody", "nogroup")
        initdb: list[str | Path] = [
            binaries / "initdb",
            "-D",
            folder / "data",
            "-A",
            "trust",
            "-U",
            "alignkit",
            "-E",
            "UTF8",
            "--no-locale",
            "--no-sync",
        ]
        subprocess.run([*self._as_nobody, "--", *initdb], check=True, capture_output=True)
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        # However the tests end, the server ends with them.
        command: list[str | Path] = [*self._as_nobody, "--pdeathsig=INT", "--", self._binaries / "postgres", "-D", self._folder / "data"]
        settings = {"listen_addresses": "", "unix_socket_directories": self._folder, "fsync": "off", "max_connections": 200}
        options = [option for name, value in settings.items() for option in ("-c", f"{name}={value}")]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen([*command, *options], stdout=log, stderr=log)
        for _ in range(600):
            if subprocess.run([self._binaries / "pg_isready", "-q", "-h", self._folder, "-U", "alignkit"], check=False).returncode == 0:
                return
            assert self._process.poll() is None, Path(log.name).read_text()
            time.sleep(0.05)
        raise TimeoutError("PostgreSQL does not answer")

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop it and drop its connections: in good order, or with SIGQUIT as if it had crashed."""
        self._process.send_signal(how)
        self._process.wait(timeout=60)

    def url(self, database: str) -> str:
        """Where a database of this server is."""
        return f"postgresql://alignkit@/{database}?host={self._folder}"

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"test_{time.monotonic_ns()}"
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement beside all the databases of the tests."""
        import psycopg

        with psycopg.connect(host=str(self._folder), user="alignkit", dbname="postgres", autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """The server; tests that need it are skipped where PostgreSQL is not installed."""
    if importlib.util.find_spec("psycopg") is None:
        missing("psycopg is not installed")
    found = shutil.which("initdb")
    binaries = Path(found).resolve().parent if found else next(iter(reversed(_DEBIAN)), None)
    if binaries is None:
        missing("PostgreSQL is not installed")
    # Not in pytest's own folder, which nobody but its owner may enter; and short, for a socket's path may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="alignkit-pg-") as folder:
        server = Postgres(binaries, Path(folder))
        yield server
        server.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database; each test that asks for it runs once with SQLite and once with PostgreSQL."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'store.db'}"
        return
    server: Postgres = request.getfixturevalue("postgres")
    name = f"test_{time.monotonic_ns()}"
    server.execute(f"CREATE DATABASE {name}")
    yield server.url(name)
    server.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    """An open store on an empty database."""
    with Store.open(database_url) as store:
        yield store
