"""A reward service for tests: a process of its own that answers by a plan and writes down what it was asked and what it answered.

``python reward_service.py PORT PLAN LOG``. The plan is JSON: ``scores`` says what a sample is worth (``length``, ``random``, or a mapping
of sample ids to numbers), ``replies`` holds what becomes of the first requests, one each, and ``poison`` the ids of samples that make a
request fail for ever.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # it would hold back what follows the headers for 40 ms
    plan: dict[str, Any]
    log: Path
    lock = threading.Lock()
    asked = 0

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        samples = json.loads(body)["samples"]
        ids = [sample["id"] for sample in samples]
        with self.lock:
            number = Handler.asked
            Handler.asked += 1
            self.note(asked=ids, key=self.headers["Authorization"], body=json.loads(body))
        replies = self.plan.get("replies", [])
        reply = {"status": 500} if set(ids) & set(self.plan.get("poison", [])) else replies[number] if number < len(replies) else {}
        time.sleep(reply.get("sleep", 0.0))
        if "drop" in reply:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif "exit" in reply:
            os._exit(1)
        elif "half" in reply:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"scores": [')
            self.close_connection = True
        else:
            scores = [{"value": self.value(sample), "parts": {"length": len(sample["response"])}} for sample in samples]
            text = reply.get("body") or json.dumps({"scores": scores})
            if "repeat" in reply:
                text = reply["repeat"][0] * reply["repeat"][1]
            self.send_response(reply.get("status", 200))
            for name, value in reply.get("headers", {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())
            if not reply or set(reply) == {"sleep"}:
                with self.lock:
                    self.note(answered=ids)

    def value(self, sample: dict[str, Any]) -> float | None:
        known = self.plan.get("scores", "length")
        if isinstance(known, dict):
            value: float = known[sample["id"]]
            return value
        return int.from_bytes(os.urandom(7), "big") / 2**55 if known == "random" else float(len(sample["response"]))

    def note(self, **values: Any) -> None:
        with self.log.open("a") as handle:
            handle.write(json.dumps(values) + "\n")

    def log_message(self, format: str, *arguments: Any) -> None:
        """What is worth knowing is in the log."""


class Server(ThreadingHTTPServer):
    allow_reuse_address = True
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed or did not wait."""


@dataclass
class RewardService:
    """The process, and what it wrote down."""

    folder: Path
    plan: dict[str, Any] = field(default_factory=dict)
    port: int = 0
    process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/score"

    def start(self) -> None:
        """Begin, on the port that it had before, if any."""
        (self.folder / "plan.json").write_text(json.dumps(self.plan))
        command = [sys.executable, "-S", __file__, str(self.port), str(self.folder / "plan.json"), str(self.folder / "log.jsonl")]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def noted(self, what: str) -> list[Any]:
        """What was written down under ``asked``, ``answered``, ``body`` or ``key``, one a request."""
        path = self.folder / "log.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line[what] for line in lines if what in line]


@contextmanager
def reward_service(folder: Path, **plan: Any) -> Iterator[RewardService]:
    """Within, a service that answers at ``url``; ``plan`` as above."""
    folder.mkdir(exist_ok=True)
    service = RewardService(folder, plan)
    service.start()
    try:
        yield service
    finally:
        service.kill()


def main() -> None:
    port, plan, log = sys.argv[1:]
    Handler.plan, Handler.log = json.loads(Path(plan).read_text()), Path(log)
    server = Server(("127.0.0.1", int(port)), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
