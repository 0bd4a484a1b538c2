"""What those who run a labelling see: figures worked by hand, on a page, in tables and as JSON; what rests on too little is not told."""

from __future__ import annotations

import csv
import io
import random
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from sqlalchemy import Connection

from alignkit_serve.consensus import Bias, Confusion, Pair, Share, consensus
from alignkit_serve.label_tables import csv_text
from alignkit_serve.store import keys, labels
from alignkit_serve.store.annotators import Author
from alignkit_serve.store.verdicts import Verdict
from tests.serve.fakes import ScriptedEngine, scripted
from tests.serve.running import Running, running

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def verdict(who: str, item: str, *tiers: str, **values: Any) -> Verdict:
    """``verdict("ann", "p", "a", "bc")``: a is the best answer to p, and b and c are as good as each other."""
    ranks = {id: rank for rank, tier in enumerate(tiers, start=1) for id in tier}
    made = {"target_id": f"group of {item}", "rating": None, "slots": (), "page": "api", "dwell_ms": None}
    return Verdict(**{**made, "item": item, "annotator_id": who, "ranks": ranks, **values})


def rating(who: str, answer: str, value: int) -> Verdict:
    return verdict(who, f"prompt of {answer}", target_id=answer, rating=value)


RANKED = [
    verdict("x", "p", "a", "b", "c", dwell_ms=4000),
    verdict("y", "p", "a", "b", "c"),
    verdict("z", "p", "c", "b", "a"),
    verdict("x", "q", "de", dwell_ms=1000),
    verdict("y", "q", "de"),
]


def test_agreement_and_alpha_of_rankings() -> None:
    found = consensus(RANKED, {})
    assert found.agreement is not None
    assert (found.agreement.value, found.agreement.items) == (4 / 10, 2)
    # Each of p's three pairs: 1 better-better and 2 better-worse coincidences, half either way round; q's: 2 of ties.
    # n = 11, of which 4.5 better, 4.5 worse, 2 ties; observed 6, expected 2 * (4.5 * 4.5 + 2 * 4.5 * 2) / 10.
    assert found.alpha_pairs is not None
    assert found.alpha_pairs.value == pytest.approx(1 - 6 / (76.5 / 10))
    assert found.alpha_pairs.low <= found.alpha_pairs.value <= found.alpha_pairs.high
    assert (found.alpha_ratings, found.tau) == (None, None)  # q has ties only, and one prompt is too few.
    assert found.pairs[:2] == (Pair("p", "a", "b", 2, 0, 1), Pair("p", "a", "c", 2, 0, 1))
    assert found.pairs[3] == Pair("q", "d", "e", 0, 2, 0)


def test_each_annotator_beside_gold_and_beside_the_others() -> None:
    x, y, z = consensus(RANKED, {"group of p": [["a"], ["b", "c"]]}).annotators
    assert [each.id for each in (x, y, z)] == ["x", "y", "z"]
    assert (x.rankings, x.ratings, x.dwell_seconds, y.dwell_seconds) == (2, 0, 2.5, None)
    assert (x.agreement, z.agreement) == (Share(4, 7), Share(0, 6))
    assert (x.gold, z.gold) == (Share(2, 3), Share(0, 3))
    assert (x.ties, z.ties) == (Share(1, 4), Share(0, 3))
    # About p's pairs the others of x are one against one; those of z agree.
    assert x.confusion == Confusion(same=0, tie=0, reversed=0, tied=1, split=0)
    assert z.confusion == Confusion(same=0, tie=0, reversed=3, tied=0, split=0)


def test_tau_and_alpha_of_ratings() -> None:
    said = [
        verdict("x", "p", "a", "b", "c"),
        verdict("y", "p", "a", "c", "b"),  # 2 of 3 pairs in order: 1/3
        verdict("x", "q", "d", "e"),
        verdict("y", "q", "d", "e"),  # 1
        *(rating(who, answer, value) for answer, value in (("a", 7), ("b", 2), ("c", 5)) for who in "xy"),
    ]
    found = consensus(said, {})
    assert found.tau is not None
    assert found.tau.value == pytest.approx((1 / 3 + 1) / 2)
    assert found.alpha_ratings is not None
    assert (found.alpha_ratings.value, found.alpha_ratings.items) == (1.0, 3)


def test_the_newest_of_what_one_says_of_a_pair_counts() -> None:
    found = consensus([verdict("x", "p", "a", "b"), verdict("x", "p", "b", "a")], {})
    assert found.pairs == (Pair("p", "a", "b", 0, 0, 1),)
    assert found.annotators[0].agreement == Share(0, 0)
    assert Share(0, 0).value is None


def test_the_place_on_the_page() -> None:
    shown = [verdict("x", f"p{i}", "a", "b", slots=("a", "b"), page="label-1") for i in range(8)]
    shown += [verdict("x", f"q{i}", "b", "a", slots=("a", "b"), page="label-1") for i in range(2)]
    shown += [
        verdict("x", "r", "ab", slots=("a", "b"), page="label-1"),  # says nothing of places
        verdict("x", "s", "ab", "c", slots=("c", "a", "b"), page="chat"),
        verdict("x", "t", "a", "b", page="chat"),  # order unknown
        verdict("x", "u", "a", "b", slots=("a", "x"), page="chat"),
    ]
    chat, label = consensus(shown, {}).bias
    assert chat == Bias("chat", first=0, expected=pytest.approx(2 / 3), of=1, p=pytest.approx(1 / 3))
    assert label == Bias("label-1", first=8, expected=5.0, of=10, p=pytest.approx(112 / 1024))


def test_nothing_said_is_no_figure() -> None:
    found = consensus([], {})
    assert (found.agreement, found.alpha_pairs, found.alpha_ratings, found.tau) == (None, None, None, None)
    assert (found.annotators, found.bias, found.pairs) == ((), (), ())


def test_a_table_has_no_formulas() -> None:
    text = csv_text("pairs", [["=HYPERLINK(1)", "+1", "@x", -1, None, 'a,"b"\n'], ["-2", "\tx", "\ry", 0.5, "plain", ""]])
    assert list(csv.reader(io.StringIO(text, newline="")))[1:] == [
        ["'=HYPERLINK(1)", "'+1", "'@x", "-1", "", 'a,"b"\n'],
        ["'-2", "'\tx", "'\ry", "0.5", "plain", ""],
    ]


# On a server.


@pytest.fixture
def server(database_url: str, tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path / "only", database_url, load=scripted(only=ScriptedEngine())) as started:
        yield started


def labelled(server: Running, prompts: int, seed: int = 1) -> None:
    """Three annotators rank four answers to each prompt: two mostly as the answers really are, one as they stand on the page."""
    draw = random.Random(seed)
    with server.http("admin") as admin:
        tasks = []
        for i in range(prompts):
            gold = {"gold": [[0], [1], [2, 3]]} if i % 5 == 0 else {}
            body = {"prompt": f"Question {i}", "responses": [f"Answer {j}" for j in "abcd"], "overlap": 3, **gold}
            tasks.append(admin.post("/v1/label/tasks:import", json=body).raise_for_status().json())
    for careful in (0.2, 1.5, 9.0):
        key = server.store.write(_key).result()
        with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {key}"}, trust_env=False) as client:
            for task in tasks:
                answers = list(task["completion_ids"])
                shown = draw.sample(answers, len(answers))
                order = shown if careful > 5 else sorted(answers, key=lambda id: answers.index(id) + draw.gauss(0, careful))
                tiers = [[order[0]], [order[1], order[2]], [order[3]]] if draw.random() < 0.3 else [[id] for id in order]
                about = {"slots": shown, "ui_version": "label-1", "dwell_ms": draw.randrange(9000, 60000)}
                said = {"kind": "ranking", "target_type": "group", "target_id": task["group_id"], "value": tiers, "presentation": about}
                rated = [
                    {"kind": "rating", "target_type": "completion", "target_id": id, "value": min(7, 2 + 2 * order[::-1].index(id))}
                    for id in answers
                ]
                items = [{**each, "idempotency_key": f"{task['id']}/{i}"} for i, each in enumerate([said, *rated])]
                results = client.post("/v1/feedback:batch", json={"items": items}).json()["data"]
                assert {each["status"] for each in results} == {201}


def _key(connection: Connection) -> str:
    return keys.create(connection, "annotator", ["feedback:write"], created_by="test")[1]


def test_the_figures_as_json(server: Running) -> None:
    with server.http("admin") as admin:
        empty = admin.get("/v1/label/agreement").json()
        assert [empty[name] for name in ("agreement", "alpha_pairs", "alpha_ratings", "tau")] == [None] * 4
        assert empty["progress"] == {"tasks": {}, "assignments": {}, "days": {}}
        labelled(server, 10)
        found = admin.get("/v1/label/agreement").json()
    assert found["agreement"]["items"] == 10
    assert 0.3 < found["agreement"]["low"] < found["agreement"]["value"] < found["agreement"]["high"] < 1
    assert found["alpha_ratings"]["items"] == 10
    assert found["progress"]["tasks"] == {"open": 10}
    careful, fair, careless = found["annotators"]
    assert careful["gold"]["value"] > fair["gold"]["value"] > careless["gold"]["value"]
    assert (careless["rankings"], careless["ratings"], careless["gold"]["of"]) == (10, 40, 12)
    (page,) = found["position_bias"]
    assert (page["page"], page["of"]) == ("label-1", 30)
    assert page["p"] < 0.01


def test_the_page_and_its_tables(server: Running) -> None:
    with server.http("label", "feedback:read") as stranger:
        for path in ("/label/admin", "/label/admin.csv?table=tasks"):
            assert stranger.get(path).status_code == 403
    assert httpx.get(f"{server.url}/label/admin", trust_env=False).status_code in (303, 401)
    with server.http("admin") as admin:
        empty = admin.get("/label/admin")
        assert (empty.status_code, empty.headers["content-type"], empty.headers["cache-control"]) == (
            200,
            "text/html; charset=utf-8",
            "no-store",
        )
        assert "too few" in empty.text
        labelled(server, 4)
        html = admin.get("/label/admin").text
        annotators, tasks, pairs = (
            list(csv.DictReader(io.StringIO(admin.get("/label/admin.csv", params={"table": table}).text)))
            for table in ("annotators", "tasks", "pairs")
        )
        assert admin.get("/label/admin.csv", params={"table": "keys"}).status_code == 400
    for page in (empty.text, html):
        assert not re.search(r"\bnan\b|<script|style=|<style|\son\w+=", page, re.IGNORECASE)
    assert [row["rankings"] for row in annotators] == ["4", "4", "4"]
    assert all(row["annotator_id"] in html for row in annotators)
    assert [(row["completions"], row["gold"], row["state"]) for row in tasks] == [("4", "yes", "open"), *[("4", "no", "open")] * 3]
    assert [sum(int(row[name]) for name in ("a_better", "tie", "b_better")) for row in pairs] == [3] * 24


def submitted(server: Running, *days_ago: int) -> None:
    """So many assignments, each finished so many days ago."""

    def work(connection: Connection, at: datetime) -> None:
        given = labels.next_assignment(connection, Author(None), at)
        assert given
        labels.submit(connection, given.id, Author(None), None, at)

    for days in days_ago:
        at = datetime.now(UTC) - timedelta(days=days)
        server.store.write(partial(work, at=at)).result()


@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_in_a_browser_without_javascript(browser: Browser, tmp_path: Path, width: int) -> None:
    with running(tmp_path / "only", f"sqlite:///{tmp_path / 'store.db'}", load=scripted(only=ScriptedEngine())) as server:
        labelled(server, 20)
        submitted(server, 0, 0, 0, 1, 3, 3, 30)
        context = browser.new_context(java_script_enabled=False, viewport={"width": width, "height": 900})
        page = context.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{server.url}/label/admin")
        page.locator("input").fill(server.key("admin", "label"))
        page.get_by_role("button").click()
        page.goto(f"{server.url}/label/admin")
        assert {url.split("?")[0] for url in asked if not url.startswith(("data:", server.url))} == set()
        assert [row.inner_text().split("\t")[-1] for row in page.locator(".days tr").all()] == ["2", "1", "3"]
        assert page.locator(".wide-table tbody tr").count() == 4 + 1 + 3
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.screenshot(path=tmp_path / "admin.png", full_page=True)
        context.close()
