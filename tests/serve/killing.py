"""A server that is killed again and again under clients that write down what it acknowledged, on disk, before they go on."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import psutil
from sqlalchemy import select

from alignkit_serve.store import Store, keys
from alignkit_serve.store.tables import feedback
from tests.serve.running import until
from tests.serve.store.rows import answered, stored_policy

ROOT = Path(__file__).parents[2]
CLIENTS, ANSWERS = 8, 4

SERVER = """
import sys
from pathlib import Path
from alignkit_serve import server
from alignkit_serve.app import create_app
from alignkit_serve.auth import Keys
from alignkit_serve.settings import Limits
from alignkit_serve.store import Store
from tests.serve.fakes import ScriptedEngine, scripted

settings = server.Settings(
    policy=Path(sys.argv[2]), host="127.0.0.1", port=0, store=sys.argv[1], auth=True, models=Path(sys.argv[2]).parent,
    limits=Limits(feedback_per_target_rpm=1_000_000),
)
server.serve(settings, scripted(only=ScriptedEngine()))
"""

CLIENT = """
import os, sys
import httpx

key, number, log, *targets = sys.argv[1:]
written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
i = 0
for url in sys.stdin:
    client = httpx.Client(base_url=url.strip(), headers={"Authorization": f"Bearer {key}"}, trust_env=False, timeout=30)
    while True:
        i += 1
        # A new key, or one of the last again; alone, or with others.
        mine = [f"{number}-{max(1, i - (i % 3 == 0) - 3 * (i % 7 == 0)) + j}" for j in range(3 if i % 4 == 0 else 1)]
        bodies = [{"kind": "thumb", "target_type": "completion", "target_id": targets[len(k) % len(targets)], "value": "up"} for k in mine]
        try:
            if len(mine) == 1:
                response = client.post("/v1/feedback", json=bodies[0], headers={"Idempotency-Key": mine[0]})
                ids = [response.json()["id"]]
            else:
                items = [{**body, "idempotency_key": k} for body, k in zip(bodies, mine)]
                response = client.post("/v1/feedback:batch", json={"items": items})
                ids = [each["feedback"]["id"] for each in response.json()["data"]]
        except httpx.HTTPError:
            break
        except KeyError:
            # The process that stores it died: whether it was stored is not known until it is sent again.
            assert response.status_code == 503, response.text
            i -= 1
            continue
        assert response.status_code in (200, 201), response.text
        os.write(written, "".join(f"{k} {body['target_id']} {id}\\n" for k, body, id in zip(mine, bodies, ids)).encode())
        os.fsync(written)
    print("it is gone", flush=True)
"""


@dataclass(frozen=True)
class Toll:
    """What it came to: ids that were acknowledged, those of them that are not stored, keys with more than one row or id."""

    acknowledged: int
    lost: int
    duplicates: int
    others: int
    """Rows that nobody was told of: the kill came between the commit and the answer."""


def killed(url: str, folder: Path, rounds: int, seed: int = 0) -> Toll:
    """Kill a server of the database at ``url`` so many times, at moments drawn from ``seed``, and count."""
    with Store.open(url) as store:
        policy = stored_policy(store)
        targets = [answered(store, policy)[1].id for _ in range(ANSWERS)]
        key = store.write(lambda connection: keys.create(connection, "clients", ["feedback:write"], created_by="test")).result()[1]
    draw = random.Random(seed)
    log = folder / "acknowledged"
    log.mkdir()
    clients = [
        subprocess.Popen(
            [sys.executable, "-c", CLIENT, key, str(i), log / str(i), *targets],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for i in range(CLIENTS)
    ]  # fmt: skip
    for _ in range(rounds):
        server, at = _serve(url, folder)
        before = _size(log)
        for client in clients:
            assert client.stdin is not None
            print(at, file=client.stdin, flush=True)
        until(lambda before=before: _size(log) > before)
        time.sleep(draw.uniform(0.0, 0.5))
        if draw.random() < 0.5:
            _scribe(server.pid).kill()
            time.sleep(draw.uniform(0.0, 1.5))
        scribes = psutil.Process(server.pid).children()
        server.kill()
        server.wait(60)
        _, left = psutil.wait_procs(scribes, timeout=60)
        assert not left, "it outlives its server"
        for client in clients:
            assert client.stdout is not None
            assert client.stdout.readline() == "it is gone\n"
    for client in clients:
        client.communicate(timeout=60)
    told = [line.split() for path in log.iterdir() for line in path.read_text().splitlines() if line.count(" ") == 2]
    return _toll(url, folder, key, told)


def _scribe(server: int) -> psutil.Process:
    """The server's process that stores feedback: the only one that it has."""
    (found,) = psutil.Process(server).children()
    return found


def _size(log: Path) -> int:
    return sum(path.stat().st_size for path in log.iterdir())


def _serve(url: str, folder: Path) -> tuple[subprocess.Popen[str], str]:
    with (folder / "server.log").open("a") as errors:
        command = [sys.executable, "-c", SERVER, url, folder / "only"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("http://"):
            at = line.split()[0]
            until(partial(_listens, at))
            return process, at
    raise AssertionError((folder / "server.log").read_text()[-2000:])


def _listens(at: str) -> bool:
    try:
        return httpx.get(f"{at}/health", trust_env=False).is_success
    except httpx.TransportError:
        return False


def _toll(url: str, folder: Path, key: str, told: list[list[str]]) -> Toll:
    ids_of: dict[str, set[str]] = {}
    for idem_key, _, id in told:
        ids_of.setdefault(idem_key, set()).add(id)
    with Store.open(url) as store:
        before = dict(store.read(lambda connection: [tuple(row) for row in connection.execute(select(feedback.c.id, feedback.c.idem_key))]))
    # All of it is sent again: the ids are those that were told, and nothing is added.
    server, at = _serve(url, folder)
    try:
        with httpx.Client(base_url=at, headers={"Authorization": f"Bearer {key}"}, trust_env=False, timeout=60) as client:
            items = [
                {"kind": "thumb", "target_type": "completion", "target_id": target, "value": "up", "idempotency_key": idem_key}
                for idem_key, target in dict((idem_key, target) for idem_key, target, _ in told).items()
            ]
            for begin in range(0, len(items), 500):
                some = items[begin : begin + 500]
                for item, result in zip(some, client.post("/v1/feedback:batch", json={"items": some}).json()["data"], strict=True):
                    assert result["status"] == 200, result
                    ids_of[str(item["idempotency_key"])].add(result["feedback"]["id"])
    finally:
        scribes = psutil.Process(server.pid).children()
        server.kill()
        server.wait(60)
        _, left = psutil.wait_procs(scribes, timeout=60)
        assert not left, "it outlives its server"
    with Store.open(url) as store:
        rows = store.read(lambda connection: list(connection.scalars(select(feedback.c.idem_key))))
    told_ids = {id for _, _, id in told}
    several = sum(len(ids) > 1 for ids in ids_of.values()) + sum(number > 1 for number in Counter(rows).values())
    return Toll(
        acknowledged=len(told_ids),
        lost=len(told_ids - before.keys()),
        duplicates=several + len(rows) - len(before),
        others=len(before.keys() - told_ids),
    )
