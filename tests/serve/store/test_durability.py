"""What was acknowledged is there, whoever is killed when, and whoever else writes."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from sqlalchemy import func, select

from alignkit_serve.store import Store, new_id
from alignkit_serve.store.audit import verify
from alignkit_serve.store.inferences import sweep
from alignkit_serve.store.tables import audit, inference
from tests.serve.databases import Postgres
from tests.serve.store.rows import stored_policy

ROOT = Path(__file__).parents[3]

WRITER = """
import os, sys, threading
from alignkit_serve.store import Store, StoreUnavailable
from alignkit_serve.store.audit import record
from alignkit_serve.store.inferences import begin
from alignkit_serve.store.policies import listed
from tests.serve.store.rows import an_inference

url, threads, rows = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
store = Store.open(url)
policy = store.read(listed)[0]

def write(connection, asked):
    begin(connection, asked)
    record(connection, "child", "begin", asked.id, {})

def work():
    for _ in range(rows):
        asked = an_inference(policy)
        try:
            store.write(lambda connection: write(connection, asked)).result()
        except StoreUnavailable:
            os._exit(3)
        os.write(1, f"{asked.id}\\n".encode())

workers = [threading.Thread(target=work) for _ in range(threads)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
store.close()
"""


def writer(url: str, *, threads: int, rows: int) -> subprocess.Popen[str]:
    """A process that prints the id of each inference once the store has acknowledged it."""
    command = [sys.executable, "-c", WRITER, url, str(threads), str(rows)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def first(child: subprocess.Popen[str], rows: int) -> set[str]:
    """The next ids that it prints, so many of them."""
    assert child.stdout is not None
    return {child.stdout.readline().strip() for _ in range(rows)}


def acknowledged(child: subprocess.Popen[str]) -> set[str]:
    """All else that it has printed, once it is gone."""
    assert child.stdout is not None
    with child.stdout:
        ids = set(child.stdout.read().split())
    child.wait(timeout=60)
    return ids


def stored(store: Store) -> set[str]:
    return store.read(lambda connection: set(connection.scalars(select(inference.c.id))))


def noted(store: Store) -> set[str]:
    return store.read(lambda connection: set(connection.scalars(select(audit.c.object))))


def test_killed_again_and_again_nothing_that_was_acknowledged_is_lost(database_url: str) -> None:
    with Store.open(database_url) as store:
        stored_policy(store)
    told: set[str] = set()
    for seed in range(5):
        child = writer(database_url, threads=8, rows=1_000_000)
        moment = random.Random(seed)
        told |= first(child, moment.randint(1, 500))
        time.sleep(moment.uniform(0, 0.01))
        child.kill()
        told |= acknowledged(child)
        assert child.returncode == -signal.SIGKILL
        with Store.open(database_url) as store:
            here = stored(store)
            assert told - here == set()
            assert noted(store) == here  # Each piece of work is there as a whole.
            assert store.read(verify) is None
            store.write(sweep).result()
            assert store.write(sweep).result() == 0


def test_a_postgresql_that_crashes_keeps_what_was_acknowledged(postgres: Postgres) -> None:
    name = new_id("test_")
    postgres.execute(f"CREATE DATABASE {name}")
    with Store.open(postgres.url(name)) as store:
        stored_policy(store)
    child = writer(postgres.url(name), threads=8, rows=1_000_000)
    told = first(child, 200)
    postgres.stop(signal.SIGQUIT)
    told |= acknowledged(child)
    postgres.start()
    assert child.returncode == 3
    with Store.open(postgres.url(name)) as store:
        assert told - stored(store) == set()
        assert store.read(verify) is None
    postgres.execute(f"DROP DATABASE {name} WITH (FORCE)")


def test_two_processes_write_at_once(database_url: str) -> None:
    with Store.open(database_url) as store:
        stored_policy(store)
        children = [writer(database_url, threads=4, rows=50) for _ in range(2)]
        told = [acknowledged(child) for child in children]
        assert [child.returncode for child in children] == [0, 0]
        assert [len(ids) for ids in told] == [200, 200]
        assert stored(store) == noted(store) == told[0] | told[1]
        assert store.read(verify) is None
        assert store.read(lambda connection: connection.scalar(select(func.max(audit.c.seq)))) == 400
