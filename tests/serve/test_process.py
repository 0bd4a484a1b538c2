"""The commands as people run them: real processes, signals, a server that dies, and mistakes that get one clear line."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from alignkit.models import tiny
from alignkit.models.config import TinyLMConfig
from alignkit_serve.store import Store, inferences
from tests.fakes import scratch, tiny_folder
from tests.serve.running import until

ASK: dict[str, Any] = {"model": "live", "messages": [{"role": "user", "content": "Hello?"}]}


def alignkit(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "alignkit", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def patient_folder() -> Path:
    """A policy that can go on for long."""
    folder = scratch("patient")
    return folder if folder.is_dir() else tiny.prepare(TinyLMConfig(hidden_size=16, layers=1, positions=16_384), folder)


class Served:
    """`alignkit serve` in a process of its own; ``greeting`` is the line it begins with."""

    def __init__(self, cwd: Path, *arguments: str | Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "alignkit", "serve", *arguments, "--port", "0"],
            cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.lines: list[str] = []
        self.greeting = ""
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("http://"):
                self.greeting = line
                break
        assert self.greeting, "".join(self.lines)
        self.url = self.greeting.split()[0]
        self._reading = threading.Thread(target=lambda: self.lines.extend(self.process.stdout or []), daemon=True)
        self._reading.start()

    def output(self) -> str:
        """All that it said; it has ended."""
        self._reading.join(30)
        return "".join(self.lines)


@contextmanager
def served(cwd: Path, *arguments: str | Path) -> Iterator[Served]:
    """Within, a server runs."""
    found = Served(cwd, *arguments)
    try:
        yield found
    finally:
        found.process.kill()
        found.process.wait()


def begin_stream(url: str, tokens: int = 400) -> Iterator[bytes]:
    """The bytes of an answer of so many tokens: its stop token is forbidden."""
    body = {**ASK, "max_tokens": tokens, "stream": True, "logit_bias": {"3": -100}}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60, trust_env=False) as one:
        assert one.status_code == 200
        yield from one.iter_raw()


def test_the_greeting_tells_all_that_is_needed_and_what_it_tells_works(tmp_path: Path) -> None:
    with served(tmp_path, tiny_folder()) as server:
        assert re.fullmatch(
            r"http://127\.0\.0\.1:\d+ serves llama-0@[0-9a-f]{12}; store sqlite:///alignkit\.db; "
            r"make a key: alignkit keys create --scopes infer --store sqlite:///alignkit\.db\n",
            server.greeting,
        )
        made = alignkit("keys", "create", "--scopes", "infer,admin", "--name", "mine", cwd=tmp_path)
        assert re.fullmatch(r"ak_\w{12}_\w{43}\n", made.stdout)
        key = made.stdout.strip()
        client = OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
        answer = client.chat.completions.create(**ASK, max_tokens=3)
        assert answer.usage.completion_tokens <= 3
        listing = alignkit("keys", "list", cwd=tmp_path).stdout
        assert "in force" in listing
        assert key not in listing
        policies = alignkit("policies", "--url", server.url, cwd=tmp_path, ALIGNKIT_API_KEY=key).stdout
        assert policies.startswith("live")
        said = subprocess.run(
            [sys.executable, "-m", "alignkit", "chat", "--url", server.url, "--max-tokens", "4"],
            input="hello\n", cwd=tmp_path, env={**os.environ, "ALIGNKIT_API_KEY": key}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert said.stdout
        assert alignkit("keys", "revoke", key.split("_")[1], cwd=tmp_path).returncode == 0
        assert "revoked" in alignkit("keys", "list", cwd=tmp_path).stdout
        assert alignkit("audit", "verify", cwd=tmp_path).stdout == "the audit is whole\n"
        assert "key.revoke" in alignkit("audit", "show", cwd=tmp_path).stdout


def test_sigterm_lets_an_answer_finish_and_exits_well(tmp_path: Path) -> None:
    with served(tmp_path, tiny_folder(), "--no-auth") as server:
        stream = begin_stream(server.url)
        text = next(stream)
        server.process.send_signal(signal.SIGTERM)
        text += b"".join(stream)
        assert text.endswith(b"data: [DONE]\n\n")
        assert b'"error"' not in text
        assert server.process.wait(30) == 0
        assert "draining" in server.output()
        assert "Traceback" not in server.output()
    with Store.open(f"sqlite:///{tmp_path / 'alignkit.db'}") as store:
        (row,), _ = store.read(inferences.listed)
        assert row.status == "done"


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    with served(tmp_path, patient_folder(), "--no-auth") as server:
        stream = begin_stream(server.url, 15_000)
        next(stream)
        server.process.send_signal(signal.SIGINT)
        until(lambda: any("draining" in line for line in server.lines))
        server.process.send_signal(signal.SIGINT)
        assert b"".join(stream).endswith(b'"code":"draining"}}\n\ndata: [DONE]\n\n')
        assert server.process.wait(20) == 0
        assert "Traceback" not in server.output()


def test_answers_of_a_server_that_died_are_marked_at_the_next_start(tmp_path: Path) -> None:
    with served(tmp_path, patient_folder(), "--no-auth") as server:
        stream = begin_stream(server.url, 15_000)
        first = next(stream)
        id = re.search(rb'"id":"(chatcmpl-\w+)"', first)
        assert id is not None
        server.process.kill()
        server.process.wait()
        with pytest.raises(httpx.HTTPError):
            for _ in stream:
                pass
    with served(tmp_path, patient_folder(), "--no-auth") as again:
        assert any("1 answers were in progress" in line for line in again.lines)
    with Store.open(f"sqlite:///{tmp_path / 'alignkit.db'}") as store:
        found = store.read(lambda connection: inferences.get(connection, id[1].decode()))
        assert found is not None
        assert found.status == "aborted"


MISTAKES = {
    "nothing there": (["nowhere"], "is not there; allowed: a run's folder, one of its stages, or a transformers folder"),
    "open to the network": ([tiny_folder(), "--no-auth", "--host", "0.0.0.0"], "--no-auth with --host 0.0.0.0"),
    "no key yet": ([tiny_folder(), "--host", "0.0.0.0"], "alignkit keys create"),
    "no store": ([tiny_folder(), "--store", "mysql://x/y"], "sqlite:///"),
    "a host that is none": ([tiny_folder(), "--host", "no.such.host.invalid", "--no-auth"], "--no-auth with --host"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_clear_line(mistake: str, tmp_path: Path) -> None:
    arguments, told = MISTAKES[mistake]
    done = alignkit("serve", *arguments, "--port", "0", cwd=tmp_path)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = alignkit("serve", tiny_folder(), "--port", str(port), cwd=tmp_path)
    assert done.returncode == 2
    assert f"127.0.0.1:{port} cannot be listened on" in done.stderr


def test_commands_without_a_server_or_a_key_say_what_to_do(tmp_path: Path) -> None:
    nobody = alignkit("promote", "x", "--url", "http://127.0.0.1:9", cwd=tmp_path)
    assert nobody.returncode == 2
    assert "is `alignkit serve` running there?" in nobody.stderr
    unknown = alignkit("keys", "create", "--scopes", "infre", cwd=tmp_path)
    assert unknown.returncode == 2
    assert "did you mean infer?" in unknown.stderr
    with served(tmp_path, tiny_folder()) as server:
        keyless = alignkit("policies", "--url", server.url, cwd=tmp_path)
        assert keyless.returncode == 2
        assert "ALIGNKIT_API_KEY" in keyless.stderr
