"""What was acknowledged is there, whenever the server is killed. ALIGNKIT_KILLS="50,20" does it all: so often on SQLite and PostgreSQL."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.serve.databases import Postgres
from tests.serve.killing import Toll, killed

SQLITE, POSTGRESQL = (int(number) for number in os.environ.get("ALIGNKIT_KILLS", "5,3").split(","))


def check(toll: Toll, rounds: int) -> None:
    print(toll)
    assert (toll.lost, toll.duplicates) == (0, 0)
    assert toll.acknowledged > 10 * rounds


@pytest.mark.slow
def test_a_server_that_is_killed_on_sqlite_has_lost_nothing(tmp_path: Path) -> None:
    check(killed(f"sqlite:///{tmp_path / 'store.db'}", tmp_path, SQLITE), SQLITE)


@pytest.mark.slow
def test_a_server_that_is_killed_on_postgresql_has_lost_nothing(postgres: Postgres, tmp_path: Path) -> None:
    url = postgres.new_database()
    check(killed(url, tmp_path, POSTGRESQL), POSTGRESQL)
