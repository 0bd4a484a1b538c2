"""Label tasks by the thousand: answers are sampled from a server's policies, or read from a file, and a task is made of each prompt's.

What is done is known to the server: each prompt's task has a tag that follows from all that its answers depend on. Run again, it goes on.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx

from alignkit.api import FilePath, Prompt, Ranking, Row
from alignkit_serve.client import BadRequest, ServerError, granted, reached

T = TypeVar("T")

_AT_ONCE = 8
"""Prompts in progress."""

_TRIES = 30
_LONGEST_WAIT = 60.0
"""A server that is busy says for how long; it is asked so often, and never after more seconds than that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How the answers to a prompt are made. ``policies``: their full names; the ``answers`` are split evenly over them."""

    policies: tuple[str, ...]
    answers: int
    temperature: float
    max_tokens: int

    def shares(self) -> list[tuple[str, int]]:
        """Each policy, and how many answers it gives."""
        each, more = divmod(self.answers, len(self.policies))
        return [(policy, each + (i < more)) for i, policy in enumerate(self.policies)]

    def tag(self, prompt: Prompt) -> str:
        """What the task of a prompt is found by."""
        turns = [[message.role, message.content] for message in prompt.messages]
        return _digest([turns, prompt.plain, self.policies, self.answers, self.temperature, self.max_tokens]).hex()[:32]

    def seed(self, prompt: Prompt, policy: str) -> int:
        """The same whenever it is asked for, so that the request is the same too."""
        return int.from_bytes(_digest([self.tag(prompt), policy])[:7], "big")

    def request(self, prompt: Prompt, policy: str, n: int) -> tuple[str, dict[str, Any]]:
        """The path and the body that ask a policy for its share."""
        asked = {
            "model": policy,
            "n": n,
            "seed": self.seed(prompt, policy),
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "alignkit": {"consent": {"train": True}},
        }
        if prompt.plain:
            return "/v1/completions", {**asked, "prompt": prompt.messages[0].content}
        turns = [{"role": message.role, "content": message.content} for message in prompt.messages]
        return "/v1/chat/completions", {**asked, "messages": turns}


@dataclass(slots=True)
class Tally:
    """How far it is: of so many prompts, how many have a task that was made now or was there, and of how many none can be made."""

    total: int
    made: int = 0
    there: int = 0
    left_out: int = 0

    @property
    def done(self) -> int:
        """All that were looked at."""
        return self.made + self.there + self.left_out

    def __str__(self) -> str:
        out = f", {self.left_out} left out" if self.left_out else ""
        return f"{self.done} of {self.total} prompts: {self.made} tasks made, {self.there} were there{out}"


class Maker:
    """A server's label tasks, asked for with one key. ``say`` is told how far it is, now and then."""

    def __init__(self, url: str, key: str | None, say: Callable[[str], None]) -> None:
        self._url, self._say = url.rstrip("/"), say
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.AsyncClient(base_url=self._url, headers=headers, timeout=600.0, trust_env=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def policies(self, names: Sequence[str]) -> tuple[str, ...]:
        """The full names of policies, each once. Raises ``ServerError`` for one that the server does not have."""
        models = (await self._ask("GET", "/v1/models")).json()["data"]
        full = {name: model["alignkit"]["policy_version"] for model in models for name in (model["id"], model["id"].partition("@")[0])}
        if unknown := [name for name in names if name not in full]:
            raise ServerError(f"{self._url} has no policy {unknown[0]!r}; it has: {', '.join(model['id'] for model in models)}")
        return tuple(dict.fromkeys(full[name] for name in names))

    async def sample(self, prompts: Iterable[Prompt], recipe: Recipe, *, overlap: int) -> Tally:
        """Sample answers to each prompt and make a task of them; prompts without two different answers are left out, with a word."""
        by_tag = {recipe.tag(prompt): prompt for prompt in prompts}
        tally = Tally(len(by_tag))

        async def one(item: tuple[str, Prompt]) -> None:
            tag, prompt = item
            if (await self._ask("GET", "/v1/label/tasks", params={"tag": tag})).json()["data"]:
                tally.there += 1
                return
            try:
                ids = await self._answers(prompt, recipe)
            except BadRequest as error:
                self._leave_out(tally, prompt, str(error))
                return
            if len(ids) < 2:
                self._leave_out(tally, prompt, f"its {recipe.answers} answers are the same or empty, and nobody could rank them")
                return
            await self._make(tally, "/v1/label/tasks", {"completion_ids": ids, "overlap": overlap, "tag": tag})

        await self._each(by_tag.items(), one, tally)
        return tally

    async def bring(self, rankings: Sequence[tuple[Ranking, bool]], *, overlap: int) -> Tally:
        """Make a task of each prompt's responses; with True beside it, its ranks are gold. Raises ``ServerError`` that names the row."""
        tally = Tally(len(rankings))

        async def one(item: tuple[Ranking, bool]) -> None:
            ranking, golden = item
            messages = [{"role": message.role, "content": message.content} for message in ranking.prompt.messages]
            asked = {"prompt": messages[0]["content"]} if ranking.prompt.plain else {"messages": messages}
            gold = {"gold": tiers(ranking.ranks)} if golden else {}
            body = {**asked, "responses": list(ranking.responses), "overlap": overlap, **gold}
            try:
                await self._make(tally, "/v1/label/tasks:import", body)
            except ServerError as error:
                raise ServerError(f"{ranking.prompt.origin}: {error}") from error

        await self._each(rankings, one, tally)
        return tally

    async def _answers(self, prompt: Prompt, recipe: Recipe) -> list[str]:
        """The ids of the different answers that say something."""
        found: dict[str, str] = {}
        for policy, n in recipe.shares():
            path, body = recipe.request(prompt, policy, n)
            for choice in (await self._ask("POST", path, body)).json()["choices"]:
                text = choice["text"] if prompt.plain else choice["message"]["content"]
                if text.strip():
                    found.setdefault(text, choice["alignkit"]["completion_id"])
        return list(found.values())

    async def _make(self, tally: Tally, path: str, body: dict[str, Any]) -> None:
        new = (await self._ask("POST", path, body)).status_code == 201
        tally.made += new
        tally.there += not new

    def _leave_out(self, tally: Tally, prompt: Prompt, why: str) -> None:
        tally.left_out += 1
        self._say(f"{prompt.origin}: left out: {why}")

    async def _each(self, items: Iterable[T], work: Callable[[T], Awaitable[None]], tally: Tally) -> None:
        """Several at once. What is wrong with one ends all."""
        waiting, often = iter(items), max(1, tally.total // 20)

        async def worker() -> None:
            for item in waiting:
                await work(item)
                if tally.done % often == 0 and tally.done < tally.total:
                    self._say(str(tally))

        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(_AT_ONCE):
                    workers.create_task(worker())
        except ExceptionGroup as group:
            # The first to fail, which ended the others: people are told of one problem, not of a group of them.
            raise group.exceptions[0] from None
        except asyncio.CancelledError:
            self._say(f"stopped at {tally}; the same command goes on")
            raise

    async def _ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, params: dict[str, str] | None = None
    ) -> httpx.Response:
        for _ in range(_TRIES):
            with reached(self._url):
                response = await self._client.request(method, path, json=body, params=params)
            wait = response.headers.get("retry-after", "")
            if response.status_code not in (429, 503) or not wait.isdigit():
                break
            await asyncio.sleep(min(float(wait), _LONGEST_WAIT))
        granted(self._url, response)
        return response


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file of JSON lines. Raises ``DataError`` that names file and line."""
    from alignkit.data import records

    return records.prompts(_rows(path))


def read_rankings(path: Path) -> list[tuple[Ranking, bool]]:
    """Prompts with their responses, and whether the row ranks them. Raises ``DataError`` that names file and line."""
    from alignkit.data import records

    rows = _rows(path)
    ranked = [row.values.get("responses") is None or row.values.get("ranks") is not None for row in rows]
    return list(zip(records.rankings([row if known else _tied(row) for row, known in zip(rows, ranked, strict=True)]), ranked, strict=True))


def tiers(ranks: Sequence[int]) -> list[list[int]]:
    """Places by rank, the best first."""
    return [[place for place, each in enumerate(ranks) if each == rank] for rank in sorted(set(ranks))]


def _rows(path: Path) -> list[Row]:
    from alignkit.data.sources import DATA_SPECS, FileConfig

    lines = next(spec for spec in DATA_SPECS if spec.kind == "jsonl")
    return list(lines.build(FileConfig(path=FilePath(str(path)))).rows())


def _tied(row: Row) -> Row:
    """With ranks that say nothing, so that all else of it is checked."""
    responses = row.values["responses"]
    return Row({**row.values, "ranks": [1] * len(responses) if isinstance(responses, list) else []}, row.origin)


def _digest(what: Any) -> bytes:
    return hashlib.sha256(json.dumps(what, ensure_ascii=False).encode()).digest()
