"""The process that stores feedback: it answers as the store does, dies, comes back, and ends with its server."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import psutil
import pytest
from sqlalchemy import func, select

from alignkit_serve.scribe import Scribe
from alignkit_serve.store import Store, StoreError, StoreUnavailable, feedback
from alignkit_serve.store.annotators import Author
from alignkit_serve.store.feedback import Accepted, Opinion, Refused
from alignkit_serve.store.tables import feedback as table
from tests.serve.store.test_feedback import a_thumb, answers


def told(store: str, said: Callable[[Scribe], Awaitable[Any]]) -> Any:
    """What comes of a conversation with a scribe."""

    async def talk() -> Any:
        scribe = Scribe(store)
        try:
            return await said(scribe)
        finally:
            await scribe.close()

    return asyncio.run(talk())


@pytest.fixture
def judged(database_url: str) -> tuple[str, list[str], str]:
    """An inference, its completions and their group."""
    with Store.open(database_url) as store:
        return answers(store, 3)


def every_kind(inference: str, completions: list[str], group: str) -> list[Opinion]:
    """Opinions of all forms, with all that one can have."""
    a, b, c = completions
    said = a_thumb(a, presentation={"slots": [b, a], "seed": 2**53 + 1, "dwell_ms": 7}, occurred_at=datetime(2026, 2, 3, 4, 5, 6, 7, UTC))
    others = [
        replace(said, kind="preference", target_type="group", target_id=group, value={"a": a, "b": c, "choice": "tie", "degree": 1}),
        replace(said, kind="ranking", target_type="inference", target_id=inference, value=[[c], [a, b]], presentation=None),
        replace(said, kind="correction", value="\u00e9\u20ac\U0001f600 \u2028\x7f", rationale='"\\\n', occurred_at=None),
        replace(said, kind="rating", value=4.0, author=Author(None, "someone")),
        replace(said, kind="flag", value="harmful", within=inference),
    ]
    return [replace(each, idem_key=f"{each.kind} \u00fc") for each in (said, *others)]


def stored(store: str) -> int:
    """How many opinions there are."""
    with Store.open(store) as opened:
        return opened.read(lambda connection: connection.scalar(select(func.count()).select_from(table))) or 0


def process() -> psutil.Process:
    """The scribe's, which is the only one that this has and that is Python."""
    (found,) = [each for each in psutil.Process().children() if "alignkit_serve.scribe" in " ".join(each.cmdline())]
    return found


def test_what_is_stored_there_is_what_would_be_stored_here(database_url: str, judged: tuple[str, list[str], str]) -> None:
    opinions = every_kind(*judged)
    found = told(database_url, lambda scribe: scribe.add(opinions))
    assert [(type(each), each.new) for each in found] == [(Accepted, True)] * len(opinions)
    with Store.open(database_url) as store:
        # The same in every character: under its key it is known again, and not refused as another.
        again = store.write(lambda connection: feedback.add(connection, opinions)).result()
    assert again == [Accepted(each.feedback, False) for each in found]
    assert told(database_url, lambda scribe: scribe.add(opinions)) == again


def test_what_is_refused_or_goes_wrong_is_told_and_nothing_of_it_stays(database_url: str, judged: tuple[str, list[str], str]) -> None:
    _, (a, *_), _ = judged

    async def said(scribe: Scribe) -> None:
        refused, accepted = await scribe.add([a_thumb("cmp-none"), a_thumb(a)])
        assert isinstance(refused, Refused)
        assert (refused.code, refused.param) == ("not_found", "target_id")
        assert isinstance(accepted, Accepted)
        with pytest.raises(StoreError, match="is not JSON"):
            await scribe.add([a_thumb(a), a_thumb(a, value=float("nan"))])
        with pytest.raises(RuntimeError, match="IntegrityError"):
            await scribe.add([a_thumb(a), a_thumb(a, author=Author("no-such-key"))])

    told(database_url, said)
    assert stored(database_url) == 1


def test_many_who_speak_at_once_each_get_their_own_answer(database_url: str, judged: tuple[str, list[str], str]) -> None:
    _, completions, _ = judged

    async def said(scribe: Scribe) -> list[Any]:
        return await asyncio.gather(*(scribe.add([a_thumb(completions[i % 3], idem_key=str(i % 6))]) for i in range(18)))

    found = [each.feedback for (each,) in told(database_url, said)]
    assert [each.target_id for each in found] == completions * 6
    assert [each.id for each in found] == [each.id for each in found[:6]] * 3
    assert stored(database_url) == 6


def test_one_that_died_is_followed_by_another(database_url: str, judged: tuple[str, list[str], str]) -> None:
    _, (a, *_), _ = judged

    async def said(scribe: Scribe) -> None:
        await scribe.start()
        process().kill()
        with pytest.raises(StoreUnavailable, match="send it again"):
            await scribe.add([a_thumb(a, idem_key="k")])
        (found,) = await scribe.add([a_thumb(a, idem_key="k")])
        assert isinstance(found, Accepted)

    told(database_url, said)
    assert stored(database_url) == 1


def test_one_who_no_longer_waits_leaves_no_answer_to_the_next(database_url: str, judged: tuple[str, list[str], str]) -> None:
    _, (a, b, _), _ = judged

    async def said(scribe: Scribe) -> Any:
        impatient = asyncio.create_task(scribe.add([a_thumb(a)]))
        await asyncio.sleep(0.01)
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        return await scribe.add([a_thumb(b)])

    (found,) = told(database_url, said)
    assert found.feedback.target_id == b


def test_signals_for_the_whole_group_are_left_to_the_server(database_url: str, judged: tuple[str, list[str], str]) -> None:
    _, (a, *_), _ = judged

    async def said(scribe: Scribe) -> None:
        await scribe.add([a_thumb(a)])
        for each in (signal.SIGINT, signal.SIGTERM):
            process().send_signal(each)
        await scribe.add([a_thumb(a)])

    told(database_url, said)
    assert stored(database_url) == 2


def test_it_ends_with_its_server(database_url: str, judged: tuple[str, list[str], str]) -> None:
    """Of one that is killed too: see ``killing``."""

    async def said(scribe: Scribe) -> int:
        await scribe.start()
        return process().pid

    assert not psutil.pid_exists(told(database_url, said))
