"""How many pieces of feedback can be given in a second? Posts to `alignkit serve` over HTTP, each answered once it is on the disk.

    python -m benchmarks.feedback [--connections N] [--items I] [--seconds S] [--rounds R] [--out FILE]

The server is a process of its own with its usual settings: keys, rate limits, SQLite with ``synchronous=FULL``; where PostgreSQL is
installed, a server of it with ``fsync=on`` is the second database. The clients are processes of their own on the same machine, and take
from the same cores. Every post is new, has its own Idempotency-Key, and is counted when its 201 has been read. With ``--items`` above 1
each request is a batch of so many, as an importer sends them, and every item counts.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import uvloop
from sqlalchemy import Connection, func, select

from alignkit.models import tiny
from alignkit.models.config import TinyLMConfig
from alignkit_serve.store import Store, keys, new_id
from alignkit_serve.store.inferences import Completion, Inference, begin, finish, prompt_sha256
from alignkit_serve.store.policies import PolicyVersion, register
from alignkit_serve.store.tables import feedback
from benchmarks.serving import served

TARGETS = 4000
"""Answers that are judged in turn: more than a minute's posts would bring each of them to its limit."""

MESSAGES = [{"role": "user", "content": "Why is the sky blue?"}]


@dataclass(frozen=True)
class Round:
    """One run: posts a second, and milliseconds from a request's first byte to its answer's last."""

    database: str
    posts: int
    rate: float
    p50_ms: float
    p99_ms: float
    most_ms: float


def main() -> int:
    """Measure, print, write."""
    told = arguments()
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory(prefix="alignkit-feedback-") as folder:
        scratch = Path(folder)
        policy = tiny.prepare(TinyLMConfig(hidden_size=16, layers=1), scratch / "tiny")
        for name, store in databases(scratch):
            key, targets = prepared(store)
            command: list[str | Path] = [sys.executable, "-m", "alignkit", "serve", policy, "--store", store]
            with served(scratch, command) as (url, _):
                measured(name, url, key, targets, told.connections, told.items, told.processes, 2.0)  # until nothing is new to it
                for _ in range(told.rounds):
                    before = count(store)
                    rounds.append(measured(name, url, key, targets, told.connections, told.items, told.processes, told.seconds))
                    # What was answered with a 201 is there, and nothing else; those that nobody waited for any more may be.
                    assert rounds[-1].posts <= count(store) - before <= rounds[-1].posts + told.connections * told.items
    print(table(rounds, told.connections, told.items))
    if told.out:
        told.out.write_text(json.dumps([asdict(one) for one in rounds], indent=1) + "\n")
    return 0


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=16, help="posts under way at once, in all")
    parser.add_argument("--items", type=int, default=1, help="opinions in a request")
    parser.add_argument("--processes", type=int, default=1, help="client processes that share them")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def databases(scratch: Path) -> Iterator[tuple[str, str]]:
    """The names and URLs of empty databases, while each of them is there."""
    yield "SQLite", f"sqlite:///{scratch / 'store.db'}"
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if found:
        with postgresql(found[-1], scratch) as url:
            yield f"PostgreSQL {found[-1].parent.name}", url


@contextmanager
def postgresql(binaries: Path, scratch: Path) -> Iterator[str]:
    """Within, a server with its usual settings, which wait for the disk. It refuses root, and so runs as nobody where this does."""
    folder = scratch / "pg"
    folder.mkdir()
    who = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"] if os.geteuid() == 0 else ["setpriv"]
    if os.geteuid() == 0:
        scratch.chmod(0o755)
        shutil.chown(folder, "nobody", "nogroup")
    data = ["-D", str(folder / "data")]
    subprocess.run([*who, "--", binaries / "initdb", *data, "-A", "trust", "-U", "alignkit"], check=True, capture_output=True)
    options = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={folder}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*who, "--", binaries / "postgres", *data, *options], stdout=log, stderr=log)
    try:
        while subprocess.run([binaries / "pg_isready", "-q", "-h", folder], check=False).returncode:
            time.sleep(0.1)
        yield f"postgresql://alignkit@/postgres?host={folder}"
    finally:
        process.terminate()
        process.wait(60)


def prepared(store: str) -> tuple[str, list[str]]:
    """A key, and the ids of answers to judge."""

    def fill(connection: Connection) -> tuple[str, list[str]]:
        version = PolicyVersion(id=new_id("pol-"), name="judged", base_model="", path="", template_sha256="", created_at=datetime.now(UTC))
        register(connection, version)
        return keys.create(connection, "clients", ["feedback:write"], created_by="benchmark")[1], [
            answered(connection, version.id) for _ in range(TARGETS)
        ]

    with Store.open(store) as opened:
        return opened.write(fill).result()


def answered(connection: Connection, policy: str) -> str:
    """The id of a completion, stored with all that it belongs to."""
    asked = Inference(
        id=new_id("chatcmpl-"),
        endpoint="chat",
        model="live",
        request_id="",
        messages=MESSAGES,
        prompt_sha256=prompt_sha256(MESSAGES),
        params={},
        metadata={},
        seed=0,
        policy_version_id=policy,
        engine="",
        consent_train=True,
        created_at=datetime.now(UTC),
    )
    said = Completion(
        id=new_id("cmp-"),
        inference_id=asked.id,
        idx=0,
        text="Rayleigh scattering.",
        token_ids=(1, 2, 3),
        raw_logprobs=(0.0, 0.0, 0.0),
        behaviour_logprobs=None,
        finish_reason="stop",
        policy_version_id=policy,
    )
    begin(connection, asked)
    finish(connection, asked.id, [said], status="done", prompt_tokens=1, completion_tokens=3)
    return said.id


def count(store: str) -> int:
    """How much feedback is stored."""
    with Store.open(store) as opened:
        return opened.read(lambda connection: connection.scalar(select(func.count()).select_from(feedback))) or 0


def measured(name: str, url: str, key: str, targets: list[str], connections: int, items: int, processes: int, seconds: float) -> Round:
    """One round, from the first post to the last answer that came in time."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        each = [(url, key, targets[i::processes], connections // processes, items, seconds) for i in range(processes)]
        pool.starmap(posting, [(*one[:-1], 0.0) for one in each])  # until they are all there
        begun = time.monotonic()
        found = pool.starmap(posting, each)
        elapsed = time.monotonic() - begun
    took = sorted(1000 * one for each_found in found for one in each_found)
    percentiles = statistics.quantiles(took, n=100, method="inclusive")
    return Round(name, items * len(took), items * len(took) / elapsed, percentiles[49], percentiles[98], took[-1])


def posting(url: str, key: str, targets: list[str], connections: int, items: int, seconds: float) -> list[float]:
    """How long each request took that was answered within the seconds."""
    return uvloop.run(_posting(url, key, targets, connections, items, time.monotonic() + seconds))


async def _posting(url: str, key: str, targets: list[str], connections: int, items: int, end: float) -> list[float]:
    address = urlsplit(url)
    each = [_client(address.hostname or "", address.port or 0, key, targets[i::connections], items, end) for i in range(connections)]
    return [one for took in await asyncio.gather(*each) for one in took]


async def _client(host: str, port: int, key: str, targets: list[str], items: int, end: float) -> list[float]:
    """One connection. Bytes by hand: a client library would take more of the machine than the server does."""
    reader, writer = await asyncio.open_connection(host, port)
    turn = itertools.cycle(targets)
    took: list[float] = []
    while (begun := time.monotonic()) < end:
        said = [{"kind": "thumb", "target_type": "completion", "target_id": next(turn), "value": "up"} for _ in range(items)]
        if items == 1:
            path, more, body = "/v1/feedback", f"Idempotency-Key: {new_id('')}\r\n", json.dumps(said[0])
        else:
            path, more, body = "/v1/feedback:batch", "", json.dumps({"items": [{**each, "idempotency_key": new_id("")} for each in said]})
        writer.write(
            f"POST {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\n{more}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        answer = await reader.readexactly(length)
        took.append(time.monotonic() - begun)
        assert head.startswith(b"HTTP/1.1 201 ") or answer.count(b'"status":201') == items, (head, answer[:500])
    writer.close()
    return took


def table(rounds: list[Round], connections: int, items: int) -> str:
    """A line a database: the round in the middle, and the slowest and fastest."""
    lines = [
        f"{connections} requests at once" + (f", {items} opinions each" if items > 1 else ""),
        "database     opinions/s (least, most)     p50 ms   p99 ms   most ms",
    ]
    for name in dict.fromkeys(one.database for one in rounds):
        mine = sorted((one for one in rounds if one.database == name), key=lambda one: one.rate)
        middle = mine[len(mine) // 2]
        spread = f"({mine[0].rate:.0f}, {mine[-1].rate:.0f})"
        lines.append(
            f"{name:<15} {middle.rate:7.0f} {spread:<16} {middle.p50_ms:8.1f} {middle.p99_ms:8.1f} {max(o.most_ms for o in mine):9.1f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
