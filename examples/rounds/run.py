"""The whole loop by real processes: a policy is served, people judge it over HTTP, the next one is trained from that and gated, and again.

    python examples/rounds/run.py FOLDER [--tiny] [--rounds 2] [--results FILE]

The first policy is the supervised stage of the quickstart, and each round runs ``configs/next_round.yaml`` as it stands; ``--tiny`` does
the same in a minute with a model that writes letters. What is done is not done again: a call that was killed is repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import taste
from openai import OpenAI
from people import PEOPLE, Judge, Visit

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "examples" / "rounds"
STORE = "sqlite:///alignkit.db"
PERSONS = "feedback:write,feedback:read"
TALKS_AT_ONCE = 8


@dataclass(frozen=True)
class Scale:
    """A model: what it is before the first round, how a round goes, and what people ask it."""

    first: Path
    next_round: Path
    prompts: Callable[[Path], list[str]]
    judge: Judge
    max_tokens: int
    temperature: float


def review_openings(folder: Path) -> list[str]:
    """Of the quickstart's data: beginnings of film reviews that it trains nothing on."""
    lines = (folder / "data/prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def short_openings(folder: Path) -> list[str]:
    """As many as people have time for, in words that the smoke config's model has seen."""
    whose = ("This", "That", "His", "Her", "Our", "The")
    what = ("film", "cast", "plot", "ending", "story", "scene")
    how = ("is", "was", "has", "got")
    return [" ".join(words) for words in itertools.product(whose, what, how)]


SMALL = Scale(HERE / "first.yaml", ROOT / "configs/next_round.yaml", review_openings, taste.kindness, 20, 0.7)
TINY = Scale(HERE / "first_tiny.yaml", HERE / "next_round_tiny.yaml", short_openings, taste.vowels, 12, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--results", type=Path, help="where the figures of the rounds are written")
    given = parser.parse_args()
    scale, folder = TINY if given.tiny else SMALL, given.folder.resolve()
    if not given.tiny and not (folder / "data").is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        alignkit("init", "quickstart", "--dir", str(folder), cwd=folder.parent)
    folder.mkdir(parents=True, exist_ok=True)
    alignkit("run", str(scale.first), cwd=folder)
    members = {"app": "infer", "admin": "admin,export", **{person.name: PERSONS for person in PEOPLE}}
    keys = {name: key(folder, name, scopes) for name, scopes in members.items()}
    with served(folder) as url:
        for number in range(1, given.rounds + 1):
            talk(scale, url, keys, folder, number)
            overrides = [f"name=round-{number}", f"gate.evaluate.server={url}"]
            alignkit("run", str(scale.next_round), *overrides, cwd=folder, key=keys["admin"])
    print(alignkit("rounds", "--store", STORE, cwd=folder, read=True))
    if given.results:
        given.results.write_text(alignkit("rounds", "--store", STORE, "--json", cwd=folder, read=True), encoding="utf-8")


def alignkit(*arguments: str, cwd: Path, key: str = "", read: bool = False) -> str:
    """Run a command as a person would; what it prints, where that is to be ``read``."""
    # The judges of the tiny rounds lie beside this file.
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "ALIGNKIT_API_KEY": key, "PYTHONPATH": path}
    command = [sys.executable, "-m", "alignkit", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE if read else None, check=False)
    if done.returncode:
        sys.exit(f"`alignkit {' '.join(arguments)}` has ended with exit code {done.returncode}; see above")
    return done.stdout or ""


def key(folder: Path, name: str, scopes: str) -> str:
    """A key of that name, kept from the call before if there was one."""
    file = folder / "keys" / name
    if not file.is_file():
        file.parent.mkdir(exist_ok=True)
        file.touch(0o600)
        file.write_text(alignkit("keys", "create", "--name", name, "--scopes", scopes, "--store", STORE, cwd=folder, read=True).strip())
    return file.read_text()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Within, the server of the first policy, or of what has been promoted since; its URL."""
    # The rounds' configs name it: a call that is repeated must find the server where it was.
    note = folder / "port"
    if not note.is_file():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            note.write_text(str(free.getsockname()[1]))
    port = note.read_text()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "alignkit", "serve", "runs/first", "--store", STORE, "--models", "runs", "--port", port]
    with subprocess.Popen(command, cwd=folder) as server:
        try:
            while not answers(url):
                if server.poll() is not None:
                    sys.exit("the server has ended; see above")
                time.sleep(0.2)
            yield url
        finally:
            server.send_signal(signal.SIGTERM)


def answers(url: str) -> bool:
    """Whether the server is up."""
    try:
        return httpx.get(f"{url}/health", trust_env=False).is_success
    except httpx.TransportError:
        return False


def talk(scale: Scale, url: str, keys: dict[str, str], folder: Path, number: int) -> None:
    """People go through all prompts once, several at a time."""
    done = folder / f"talked-{number}"
    if done.is_file():
        return
    prompts = scale.prompts(folder)
    clients = {name: OpenAI(base_url=f"{url}/v1", api_key=secret, timeout=120) for name, secret in keys.items()}
    people = {person: clients[person.name] for person in PEOPLE}
    visit = Visit(clients["app"], people, scale.judge, seed=number, max_tokens=scale.max_tokens, temperature=scale.temperature)
    started = time.monotonic()
    with ThreadPoolExecutor(TALKS_AT_ONCE) as pool:
        rankings = sum(pool.map(visit.talk, prompts))
    print(f"round {number}: {len(prompts)} prompts asked, {rankings} rankings given in {time.monotonic() - started:.0f} s", flush=True)
    done.touch()


if __name__ == "__main__":
    main()
