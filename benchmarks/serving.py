"""How fast is it served? The same chat requests to `alignkit serve` and to `transformers serve`, the same model, turn by turn.

    python -m benchmarks.serving [--model FOLDER] [--pairs N] [--out FILE]
    python -m benchmarks.serving --cancels 10000        does a server that ten thousand clients left keep anything of them?

Both servers run all the time; the one that is not asked waits. Rates are answer tokens a second, as each server counts them itself, so
that an answer that ends early is not work done fast. Every request has parameters of its own: temperatures, top_p and seeds differ.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import psutil
from openai import AsyncOpenAI

from benchmarks.bench_setup import real_model

REQUESTS, TOKENS = 16, 64
_SUBJECTS = (
    "rivers",
    "bread",
    "the moon",
    "bees",
    "chess",
    "rain",
    "maps",
    "salt",
    "trains",
    "glass",
    "bridges",
    "tea",
    "wool",
    "clocks",
    "owls",
    "ice",
)


@dataclass(frozen=True)
class Round:
    """One way of asking, once: seconds in all, tokens of all answers, and seconds until the first of each."""

    seconds: float
    tokens: int
    first: tuple[float, ...]

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def main() -> int:
    """Measure, print, write."""
    told = arguments()
    with ExitStack() as running:
        scratch = Path(running.enter_context(tempfile.TemporaryDirectory()))
        model = told.model or real_model(told.home)
        ours, process = running.enter_context(served(scratch, [sys.executable, "-m", "alignkit", "serve", model, "--no-auth"]))
        if told.cancels:
            return asyncio.run(cancelled(ours, process, told.cancels))
        peer = str(Path(sys.executable).parent / "transformers")
        theirs, _ = running.enter_context(served(scratch, [peer, "serve", model, "--dtype", "float32"]))
        rounds = asyncio.run(measured(ours, theirs, str(model), told.pairs))
    print(table(rounds))
    if told.out:
        told.out.write_text(json.dumps({way: [asdict(one) for one in each] for way, each in rounds.items()}, indent=1) + "\n")
    return 0


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a transformers folder (SmolLM2-135M-Instruct)")
    parser.add_argument("--home", type=Path, default=Path("benchmarks/.peers"), help="where the model is put")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--cancels", type=int, default=0, metavar="N", help="only this: N requests whose clients go after the first token")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


@contextmanager
def served(cwd: Path, command: list[str | Path]) -> Iterator[tuple[str, psutil.Process]]:
    """Within, a server runs; its address, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (cwd / f"{port}.log").open("w")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([*command, "--port", str(port)], cwd=cwd, stdout=log, stderr=subprocess.STDOUT, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                if httpx.get(f"{url}/health", trust_env=False).is_success:
                    break
            except httpx.HTTPError:
                time.sleep(0.2)
            if process.poll() is not None:
                raise SystemExit((cwd / f"{port}.log").read_text())
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


async def measured(ours: str, theirs: str, model: str, pairs: int) -> dict[str, list[Round]]:
    """Each way once to warm up, then ``pairs`` times, one after the other."""
    ways = {
        "alignkit, 16 at once": (AsyncOpenAI(base_url=f"{ours}/v1", api_key="-", max_retries=0, timeout=600), "live", True),
        "transformers serve, one by one": (AsyncOpenAI(base_url=f"{theirs}/v1", api_key="-", max_retries=0, timeout=600), model, False),
        "alignkit, one by one": (AsyncOpenAI(base_url=f"{ours}/v1", api_key="-", max_retries=0, timeout=600), "live", False),
    }
    for client, name, _ in ways.values():
        await ask(client, name, 0)
    rounds: dict[str, list[Round]] = {way: [] for way in ways}
    for _ in range(pairs):
        for way, (client, name, together) in ways.items():
            rounds[way].append(await one_round(client, name, together))
            print(f"{way}: {rounds[way][-1].rate:.1f} tokens/s", flush=True)
    return rounds


async def one_round(client: AsyncOpenAI, model: str, together: bool) -> Round:
    """All requests, at once or one after another."""
    begun = time.perf_counter()
    if together:
        answers = await asyncio.gather(*(ask(client, model, i) for i in range(REQUESTS)))
    else:
        answers = [await ask(client, model, i) for i in range(REQUESTS)]
    seconds = time.perf_counter() - begun
    return Round(seconds, sum(tokens for _, tokens in answers), tuple(first for first, _ in answers))


async def ask(client: AsyncOpenAI, model: str, i: int) -> tuple[float, int]:
    """Seconds until the first words of request ``i``, and its tokens in all."""
    begun, first, tokens = time.perf_counter(), 0.0, 0
    stream = await client.chat.completions.create(
        model=model,
        messages=[
            {"role": "user", "content": f"Write a long story about {_SUBJECTS[i % len(_SUBJECTS)]}, with as many details as you can."}
        ],
        max_tokens=TOKENS,
        temperature=(0.7, 1.0, 0.9, 0.8)[i % 4],
        top_p=(1.0, 0.95)[i % 2],
        seed=i,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        if not first and chunk.choices and chunk.choices[0].delta.content:
            first = time.perf_counter() - begun
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    return first, tokens


def table(rounds: dict[str, list[Round]]) -> str:
    """Rates and ratios, with their spread."""
    together, peer, alone = rounds.values()
    lines = ["", f"{REQUESTS} chat requests of at most {TOKENS} tokens: median (smallest to largest) of {len(together)}"]
    for way, each in rounds.items():
        rates, firsts = [one.rate for one in each], [first for one in each for first in one.first]
        spread = f"{statistics.median(rates):6.1f} tokens/s ({min(rates):.1f} to {max(rates):.1f})"
        slow = sorted(firsts)[int(0.95 * (len(firsts) - 1))]
        lines.append(f"  {way:<32} {spread}   first token {statistics.median(firsts):.2f} s, 95% within {slow:.2f} s")
    for name, other in (("transformers serve, one by one", peer), ("itself, one by one", alone)):
        ratios = [ours.rate / theirs.rate for ours, theirs in zip(together, other, strict=True)]
        lines.append(f"  at once, against {name:<31} {statistics.median(ratios):5.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return "\n".join(lines)


async def cancelled(url: str, process: psutil.Process, count: int) -> int:
    """Leave ``count`` answers after their first bytes, 16 at a time; 1 if the server's memory goes on growing."""
    body = {"model": "live", "messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 200, "stream": True}
    grown = []

    async def leave(client: httpx.AsyncClient) -> None:
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            await anext(response.aiter_raw())

    async with httpx.AsyncClient(timeout=120, trust_env=False) as client:
        for done in range(0, count, REQUESTS):
            await asyncio.gather(*(leave(client) for _ in range(REQUESTS)))
            if done % max(REQUESTS, count // 10 // REQUESTS * REQUESTS) == 0:
                grown.append(process.memory_info().rss / 1e6)
                print(f"{done + REQUESTS:>6} cancelled: {grown[-1]:.0f} MB", flush=True)
    half = len(grown) // 2
    growth = statistics.mean(grown[half:]) - statistics.mean(grown[1:half] or grown[:1])
    print(f"second half against first half: {growth:+.1f} MB")
    return int(growth > 20.0)


if __name__ == "__main__":
    sys.exit(main())
