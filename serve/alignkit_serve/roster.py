"""Which policy versions there are, which one answers, and how another takes its place without anything dropped or stale.

A version is staged (known), warm (loaded, and through its gates), live (answers), draining (finishes what it began) and retired. What is
in progress finishes on the version that began it; the pointer to the live one moves in one transaction.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection

from alignkit_serve.artifact import ArtifactError
from alignkit_serve.engine import Engine
from alignkit_serve.errors import ApiError, unavailable
from alignkit_serve.store import Store, audit, policies
from alignkit_serve.store.policies import PolicyVersion

T = TypeVar("T")

LIVE = "live"
"""The name under which whatever is live can be asked for."""


@dataclass(frozen=True, slots=True)
class Warm:
    """A policy that was loaded and has passed its gates: ``gates`` are the figures."""

    version: PolicyVersion
    engine: Engine
    gates: dict[str, Any] = field(default_factory=dict)


Load = Callable[[Path], Awaitable[Warm]]
"""Loads the policy that a path means and puts it through its gates. Raises ``AlignkitError``."""


@dataclass(slots=True)
class Serving:
    """A loaded version. ``answers``: how many it is giving."""

    version: PolicyVersion
    engine: Engine
    answers: int = 0


class Roster:
    """The loaded versions. ``models``: the folder below which policies may be named by the admin API."""

    def __init__(self, store: Store, load: Load, models: Path) -> None:
        self._store, self._load = store, load
        self.models = models.resolve()
        self._loaded: dict[str, Serving] = {}
        self._live: str | None = None
        self._changing = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()

    async def open(self, named: Path) -> str:
        """Serve what the operator named, or, if that was named the last time too, what was promoted since. Returns what to tell them."""
        live, last = await self._store.aread(lambda connection: (policies.live(connection), audit.latest(connection, "serve")))
        promoted_since = live is not None and last is not None and last.object == str(named.resolve()) and live.id != last.detail["policy"]
        warm = await self._load(Path(live.path) if live and promoted_since else named)

        def begin(connection: Connection) -> PolicyVersion:
            _forget_loaded(connection)
            version = _warmed(connection, warm.version)
            if live is None or live.id != version.id:
                audit.record(connection, "operator", "promote", version.id, {"from": live and live.id, "gates": warm.gates})
            if not promoted_since:
                audit.record(connection, "operator", "serve", str(named.resolve()), {"policy": version.id})
            policies.promote(connection, version.id)
            return replace(version, state="live")

        version = await self._store.awrite(begin)
        self._loaded[version.id] = Serving(version, warm.engine)
        self._live = version.id
        return f"{version.name} (promoted since {named} was first served)" if promoted_since else version.name

    async def stage(self, path: Path, actor: str, *, inside_only: bool = True) -> PolicyVersion:
        """Load a policy and put it through its gates; it is warm then, and can be asked for by its name. Raises ``AlignkitError``."""
        path = (self.models / path).resolve()
        if inside_only and not path.is_relative_to(self.models):
            raise ArtifactError(f"{path} is outside of {self.models}, the folder that this server takes policies from (--models)")
        async with self._changing:
            warm = await self._load(path)
            if warm.version.id in self._loaded:
                await warm.engine.close()
                return self._loaded[warm.version.id].version

            def note(connection: Connection) -> PolicyVersion:
                detail = {"name": warm.version.name, "path": warm.version.path, "gates": warm.gates}
                audit.record(connection, actor, "stage", warm.version.id, detail)
                return _warmed(connection, warm.version)

            version = await self._store.awrite(note)
            self._loaded[version.id] = Serving(version, warm.engine)
            return version

    async def promote(self, id: str, actor: str) -> PolicyVersion:
        """Let a warm version answer from now on; the one that did finishes what it began. Raises ``StoreError``, or ``ApiError`` 404."""
        version, _ = await self.promote_with(id, actor, lambda connection: None)
        return version

    async def promote_with(self, id: str, actor: str, also: Callable[[Connection], T]) -> tuple[PolicyVersion, T]:
        """``promote``, and ``also`` in the same transaction, so that neither is done without the other; what both return."""
        async with self._changing:
            serving = self._named(id)
            version, before = serving.version, self._live

            def write(connection: Connection) -> T:
                if version.id != before:
                    _promoted(connection, version.id, before, actor)
                return also(connection)

            done = await self._store.awrite(write)
            if version.id == before:
                return version, done
            self._live = version.id
            serving.version = replace(version, state="live")
            if before:
                old = self._loaded[before]
                old.version = replace(old.version, state="draining")
                self._retire_if_idle(old)
            return serving.version, done

    def dismiss(self, id: str) -> None:
        """Let go of a warm version that is not to answer, once it has finished what it began; any other is left as it is."""
        serving = self._loaded.get(id)
        if serving is not None and serving.version.state == "warm":
            serving.version = replace(serving.version, state="draining")
            self._retire_if_idle(serving)

    async def rollback(self, actor: str) -> PolicyVersion:
        """Put the version that was live before back in its place, through the same gates. Raises ``AlignkitError`` where there is none."""
        last = await self._store.aread(lambda connection: audit.latest(connection, "promote"))
        if last is None or last.detail["from"] is None:
            raise ArtifactError("no policy was live before this one; promote another")
        before = last.detail["from"]
        known = await self._store.aread(lambda connection: policies.get(connection, before))
        assert known is not None
        version = await self.stage(Path(known.path), actor, inside_only=False)
        if version.id != before:
            raise ArtifactError(
                f"{known.path} does not hold {known.name} any more, but {version.name}, which is warm now; promote it, or restore"
            )
        return await self.promote(before, actor)

    @contextmanager
    def leased(self, name: str) -> Iterator[Serving]:
        """The version that a request names, kept loaded within. Raises ``ApiError`` 404 for one that is not there."""
        serving = self._named(name)
        serving.answers += 1
        try:
            yield serving
        finally:
            serving.answers -= 1
            self._retire_if_idle(serving)

    def candidate(self) -> Serving | None:
        """What an A/B pair compares with the live version: the one that became warm last."""
        warm = [serving for serving in self._loaded.values() if serving.version.state == "warm"]
        return warm[-1] if warm else None

    def live(self) -> Serving:
        """What answers now."""
        if self._live is None:
            raise unavailable("loading", "the policy is being loaded", 5)
        return self._loaded[self._live]

    @property
    def ready(self) -> bool:
        """Whether anything answers."""
        return self._live is not None

    def loaded(self) -> list[Serving]:
        """All that can be asked for, the live one first."""
        return sorted(self._loaded.values(), key=lambda serving: serving.version.id != self._live)

    async def close(self) -> None:
        """Let go of every engine."""
        await asyncio.gather(*self._retiring)
        for serving in self._loaded.values():
            await serving.engine.close()
        self._loaded.clear()
        self._live = None

    def _named(self, name: str) -> Serving:
        if name == LIVE:
            return self.live()
        for serving in self.loaded():
            # Without the hash behind the @ it is whichever of that name answers, the live one first.
            if name in (serving.version.id, serving.version.name, serving.version.name.partition("@")[0]):
                return serving
        known = ", ".join(serving.version.name for serving in self.loaded())
        raise ApiError(404, "model_not_found", f"there is no model {name!r} here; there are: {LIVE}, {known}", param="model")

    def _retire_if_idle(self, serving: Serving) -> None:
        if serving.version.state == "draining" and serving.answers == 0 and serving.version.id in self._loaded:
            del self._loaded[serving.version.id]
            task = asyncio.create_task(self._retire(serving))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    async def _retire(self, serving: Serving) -> None:
        id = serving.version.id
        await serving.engine.close()
        del serving
        await self._store.awrite(lambda connection: policies.move(connection, id, "retired"))
        # Its weights are part of circles, and what was there at the start has been put out of the collector's sight.
        gc.unfreeze()
        gc.collect()
        gc.freeze()


def _warmed(connection: Connection, version: PolicyVersion) -> PolicyVersion:
    known = policies.get(connection, version.id)
    if known is None:
        policies.register(connection, version)
        known = version
    if known.state == "retired":
        policies.move(connection, version.id, "staged")
    policies.move(connection, version.id, "warm")
    return replace(known, state="warm")


def _promoted(connection: Connection, id: str, before: str | None, actor: str) -> None:
    policies.promote(connection, id)
    audit.record(connection, actor, "promote", id, {"from": before})


def _forget_loaded(connection: Connection) -> None:
    """After a start nothing is loaded, whatever the last process had."""
    for version in policies.listed(connection):
        if version.state == "live":
            policies.move(connection, version.id, "draining")
            policies.move(connection, version.id, "retired")
        elif version.state in ("staged", "warm", "draining"):
            policies.move(connection, version.id, "retired")
